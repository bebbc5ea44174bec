"use strict";
// The page: builds the sections, keeps the figures drawn, and follows a live run.

const state = { data: null, run: null, block: "", quantity: "", step: 0, follow: true, signature: "" };
const entries = new Map(); // by the figure's id: {figure, div, details, caption, stale}
const near = new Set(); // the elements of figures on the screen, and a screen above and below
const sight = new IntersectionObserver((seen) => {
  seen.forEach((one) => (one.isIntersecting ? near.add(one.target) : near.delete(one.target)));
  drawNext();
}, { rootMargin: "100% 0px" });

const byId = (id) => document.getElementById(id);

/** Take up new data: redraw, or rebuild where the run now holds something else. */
function take(data) {
  state.data = data;
  const id = data.held[state.wanted] ? state.wanted : String(data.chosen);
  state.run = data.held[id] || null;
  listRuns(id);
  if (!state.run) return;
  const { name } = state.run;
  byId("title").textContent = data.runs.length > 1 && !options.live ? `${data.file}: ${name}` : name;
  document.title = `${name} - curvdiag`;
  byId("summary").replaceChildren(...factsOf(state.run).map(([fact, value]) =>
    element("div", {}, element("dt", { textContent: fact }), element("dd", { textContent: value }))));
  const sections = sectionsOf(state.run);
  const signature = JSON.stringify([
    id, sections.map((one) => [one.id, one.note, one.figures.map((figure) => figure.id), (one.parts || []).length]),
    state.run.densities.map(densityName), [...layerTable(state.run).keys()],
  ]);
  if (signature !== state.signature) build(sections);
  else refresh(sections);
  state.signature = signature;
}

function listRuns(id) {
  const { runs, left_out: leftOut } = state.data;
  byId("chooser").hidden = runs.length < 2;
  const choices = runs.slice().reverse().map((one) => element("option", {
    value: String(one.id), selected: String(one.id) === id,
    textContent: `${cut(one.name, 60)} (${one.id}; ${one.measurements} measurements, begun ${moment(one.created)})`,
  }));
  if (JSON.stringify(choices.map((one) => one.textContent)) !== listRuns.shown) byId("run").replaceChildren(...choices);
  listRuns.shown = JSON.stringify(choices.map((one) => one.textContent));
  byId("run").value = id;
  if (leftOut) byId("run").title = `${leftOut} earlier runs are left out`;
}

function build(sections) {
  const focused = document.activeElement && document.activeElement.id;
  entries.forEach(({ div }) => Plotly.purge(div));
  entries.clear();
  sight.disconnect();
  near.clear();
  delete document.documentElement.dataset.drawn;
  byId("contents").replaceChildren(...sections.map((one) =>
    element("a", { href: `#${one.id}`, textContent: one.link || one.title })));
  byId("main").replaceChildren(...sections.map(sectionElement));
  moveSlider();
  if (focused && byId(focused)) byId(focused).focus({ preventScroll: true });
  entries.forEach(({ div }) => sight.observe(div)); // which at once reports what is near
}

function sectionElement(one) {
  const figures = one.figures.map(figureElement);
  if (one.slider) figures.splice(1, 0, sliderElement());
  return element("section", { id: one.id, attributes: { "aria-labelledby": `${one.id}-title` } },
    element("h2", { id: `${one.id}-title`, textContent: one.title }),
    one.note ? element("p", { className: `note ${one.slider ? "screen" : ""}`, textContent: one.note }) : null,
    one.slider ? densityChooser() : null, one.quantities ? quantityChooser() : null,
    element("div", { className: one.pairs && figures.length > 1 ? "charts pairs" : "charts" }, ...figures),
    ...(one.parts || []).map((part) => tableElement(part)));
}

function figureElement(figure) {
  const id = `chart-${figure.id}`;
  const div = element("div", { id, className: "chart", attributes: { role: "img" } });
  const caption = element("figcaption", { textContent: figure.caption });
  const details = element("details", {}, element("summary", { textContent: "Numbers",
    attributes: { "aria-label": `Numbers of ${figure.title || figure.caption}` } }));
  const entry = { figure, div, details, caption, stale: true };
  div.style.minHeight = `${figure.height()}px`; // so that nothing moves when it is drawn
  details.addEventListener("toggle", () => { if (details.open) fillTable(entry); });
  entries.set(figure.id, entry);
  describeFigure(entry);
  const title = figure.title ? element("h3", { textContent: figure.title }) : null;
  return element("figure", {}, title, div, caption, details);
}

function fillTable({ figure, details }) {
  if (!details.open) return undefined;
  const old = details.querySelector(".scroll");
  const made = tableElement(figure.table());
  if (!old) return details.append(made);
  const { scrollTop } = old;
  old.replaceWith(made);
  made.scrollTop = scrollTop;
  return undefined;
}

/** What stands around a figure, which is there before it is drawn. */
function describeFigure(entry) {
  entry.div.setAttribute("aria-label", entry.figure.alt());
  entry.caption.textContent = entry.figure.caption;
  fillTable(entry);
}

function drawFigure(entry) {
  const { figure, div } = entry;
  const { data, layout } = figure.draw();
  const first = !isDrawn(entry);
  const size = { height: figure.height(), ...(ink.printing ? { width: PRINT_WIDTH } : {}) };
  Plotly.react(div, data, { ...layout, ...size }, CONFIG);
  div.style.minHeight = `${size.height}px`;
  entry.stale = false;
  if (first && figure.ready) figure.ready(div);
}

function isDrawn({ div }) {
  return div.classList.contains("js-plotly-plot");
}

/** The figures near the screen one after the other, so that the page answers meanwhile; the topmost first. */
function drawNext() {
  clearTimeout(drawNext.timer);
  const entry = [...entries.values()].find(({ div, stale }) => stale && near.has(div));
  if (!entry) {
    document.documentElement.dataset.drawn = "near";
    return;
  }
  delete document.documentElement.dataset.drawn;
  drawFigure(entry);
  drawNext.timer = setTimeout(drawNext, 0);
}

/** One figure with its words again, now. */
function update(id) {
  drawFigure(entries.get(id));
  describeFigure(entries.get(id));
}

/** Redraw what is there, with the closures of the new run. */
function refresh(sections) {
  sections.flatMap((one) => one.figures).forEach((figure) => {
    const entry = entries.get(figure.id);
    entry.figure = figure;
    describeFigure(entry);
  });
  sections.filter((one) => one.parts && one.parts.length).forEach((one) =>
    byId(one.id).querySelector(":scope > .scroll").replaceWith(tableElement(one.parts[0])));
  moveSlider();
  redraw();
}

function redraw() {
  entries.forEach((entry) => { entry.stale = true; });
  drawNext();
}

// What the user chooses

function densityChooser() {
  const found = wholeFirst(state.run.densities);
  if (found.length < 2) return null;
  const select = element("select", { id: "block" }, ...found.map((one) =>
    element("option", { value: densityName(one), textContent: densityName(one) })));
  select.value = densityName(chosenDensity());
  select.addEventListener("change", () => {
    state.block = select.value;
    moveSlider();
    ["heatmap", "spectrum"].forEach(update);
  });
  return element("div", { className: "controls" }, element("div", {},
    element("label", { htmlFor: "block", textContent: "Spectrum of" }), select));
}

function quantityChooser() {
  const names = quantities(layerTable(state.run));
  if (names.length < 2) return null;
  const select = element("select", { id: "quantity" }, ...names.map((name) =>
    element("option", { value: name, textContent: quantityName(name) })));
  select.value = chosenQuantity();
  select.addEventListener("change", () => {
    state.quantity = select.value;
    update("layer-matrix");
  });
  return element("div", { className: "controls" }, element("div", {},
    element("label", { htmlFor: "quantity", textContent: "Quantity" }), select));
}

function sliderElement() {
  const slider = element("input", { id: "time", type: "range", min: "0", step: "1" });
  slider.addEventListener("input", () => {
    chooseStep(numbers(chosenDensity(), "steps")[Number(slider.value)]);
  });
  return element("div", { className: "controls" }, element("div", { className: "wide" },
    element("label", { htmlFor: "time", textContent: "Step" }), slider,
    element("output", { id: "where", htmlFor: "time" })));
}

/** Show another step; at the last one the page follows a live run. */
function chooseStep(step) {
  const steps = numbers(chosenDensity(), "steps");
  state.step = step;
  state.follow = nearest(steps, step) === steps.length - 1;
  moveSlider();
  const heatmap = entries.get("heatmap");
  if (isDrawn(heatmap)) Plotly.relayout(heatmap.div, { shapes: [stepLine(chosenDensity())] });
  update("spectrum");
}

function moveSlider() {
  const slider = byId("time");
  if (!slider || !state.run.densities.length) return;
  const density = chosenDensity();
  slider.max = String(numbers(density, "steps").length - 1);
  slider.value = String(chosenTime(density));
  byId("where").textContent = stepInWords(density);
  slider.setAttribute("aria-valuetext", stepInWords(density));
}

// Appearance

const PRINT_WIDTH = 640;

/** Figures at once in the inks of the paper, or again in those of the screen. */
function printing(now) {
  if (ink.printing === now) return;
  ink.printing = now;
  entries.forEach(drawFigure);
  if (!now) entries.forEach(({ div }) => Plotly.relayout(div, { width: null, autosize: true }));
}

window.addEventListener("beforeprint", () => printing(true));
window.addEventListener("afterprint", () => printing(false));
darkQuery.addEventListener("change", redraw);
byId("run").addEventListener("change", (event) => {
  state.wanted = event.target.value;
  state.follow = true;
  if (options.live) poll();
  else take(state.data);
});

let wide = narrow();
window.addEventListener("resize", () => {
  if (narrow() !== wide && !ink.printing) {
    wide = narrow();
    redraw();
  }
});

// A live run

const EVERY = 2000; // milliseconds between two questions, and at least five times what an answer takes
let version = "";
let asked = "";

async function poll() {
  clearTimeout(poll.timer);
  const turn = (poll.turn = (poll.turn || 0) + 1); // an answer that was overtaken by another question is dropped
  const began = performance.now();
  const wanted = state.wanted || "";
  try {
    const have = asked === wanted ? version : "";
    const query = new URLSearchParams({ run: wanted, have });
    const answer = await fetch(`data?${query}`, { signal: AbortSignal.timeout(60000) });
    const found = await answer.json();
    if (turn !== poll.turn) return;
    if (found.error) throw new Error(found.error);
    if (found.data) take(found.data);
    version = found.version;
    asked = wanted;
    say(state.run ? "" : "There is no measurement yet; this page waits for the first.", false);
  } catch (error) {
    if (turn !== poll.turn) return;
    const silent = error instanceof TypeError || error.name === "TimeoutError";
    const told = silent ? "the server does not answer" : error.message;
    say(`The connection is lost: ${told}. What is shown is what was last received; trying again.`, true);
  }
  poll.timer = setTimeout(poll, Math.max(EVERY, 5 * (performance.now() - began)));
}

function say(text, lost) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("lost", lost);
  status.hidden = !text;
}

if (options.live) poll();
else take(JSON.parse(byId("data").textContent));
