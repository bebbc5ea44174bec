"use strict";
// Colours, numbers in words, and what all figures share.

const options = JSON.parse(document.getElementById("options").textContent);
const DARK_LINES = ["#E8E8E8", "#56B4E9", "#F0A04B", "#3CC79B", "#E3A1C4", "#8FB8DE", "#F0E442"];
const ink = { printing: false };
const darkQuery = window.matchMedia("(prefers-color-scheme: dark)");
const touch = window.matchMedia("(pointer: coarse)");

/** An entry of a table by a name from the run, which may be that of something that all objects have. */
function own(table, name) {
  return Object.hasOwn(table, name) ? table[name] : undefined;
}

function isDark() {
  return darkQuery.matches && !ink.printing;
}

function theme() {
  return isDark()
    ? { paper: "#15181b", text: "#e8e8e8", soft: "#a9b0b7", grid: "#30363c", lines: DARK_LINES }
    : { paper: "#ffffff", text: "#222222", soft: "#55595e", grid: "#e6e8ea", lines: options.lines };
}

/** The colour of a line; several lines also differ in their dashes. */
function lineStyle(index, width = 1.8) {
  const { lines } = theme();
  const dash = options.dashes[(index + Math.floor(index / lines.length)) % options.dashes.length];
  return { color: lines[index % lines.length], dash, width };
}

function translucent(colour, share) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${parts.join(",")},${share})`;
}

/** Densities from low to high: away from the paper, in either theme. */
function densityScale() {
  const colours = isDark() ? options.colours.slice(0, -4).reverse() : options.colours;
  return colours.map((colour, index) => [index / (colours.length - 1), colour]);
}

/** Blue below zero, orange above, the paper between: told apart by the colour-blind. */
function signedScale() {
  return [[0, isDark() ? "#56B4E9" : "#0072B2"], [0.5, isDark() ? "#2a2f34" : "#f4f4f4"], [1, "#D55E00"]];
}

/** Text for plotly, which would take some of it for markup. */
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** A name cut to a length, in its middle. */
function cut(text, length) {
  const half = Math.floor((length - 1) / 2);
  return text.length <= length ? text : `${text.slice(0, half)}…${text.slice(text.length - half)}`;
}

/** Names without the dotted parts that all of them share, at either end, where that is more than a letter saved. */
function distinct(names) {
  const parts = names.map((name) => name.split("."));
  const least = Math.min(...parts.map((one) => one.length));
  const shared = (at) => parts.every((one) => one.at(at) === parts[0].at(at));
  let [front, back] = [0, 0];
  if (names.length > 1) {
    while (front < least - 1 && shared(front)) front += 1;
    while (back < least - front - 1 && shared(-1 - back)) back += 1;
  }
  return parts.map((one) => (front ? "…" : "") + one.slice(front, one.length - back).join(".") + (back ? "…" : ""));
}

/** The axis of steps; with a single one ticks beside it would mean nothing. */
function stepAxis(steps) {
  const single = steps.length && steps.every((step) => step === steps[0]);
  return { title: { text: "step" }, ...(single ? { tickvals: [steps[0]] } : {}) };
}

/** Four digits, without exponents where they are not needed. */
function short(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text = size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 2);
  return text.replace("-", "−").replace("e+", "e");
}

/** Powers of ten with their labels, for a logarithmic colour bar from ``low`` to ``high`` (decimal logarithms); over
 * less than three decades 2 and 5 times these as well. */
function powerTicks(low, high) {
  const every = Math.max(1, Math.ceil((high - low) / 6));
  const powers = [];
  for (let k = Math.ceil(low); k <= Math.floor(high); k += every) powers.push(k);
  if (high - low >= 3) return { tickvals: powers, ticktext: powers.map((k) => `10<sup>${k}</sup>`) };
  const values = [];
  for (let k = Math.floor(low); k <= Math.floor(high); k += 1) values.push(...[1, 2, 5].map((one) => one * 10 ** k));
  const inside = values.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
  return { tickvals: inside.map(Math.log10), ticktext: inside.map((value) => short(value, 1)) };
}

function narrow() {
  return document.documentElement.clientWidth < 600 && !ink.printing;
}

/** The layout that all figures begin with. */
function baseLayout(extra) {
  const { text, soft, grid } = theme();
  const axis = {
    color: soft, gridcolor: grid, zerolinecolor: grid, linecolor: soft, automargin: true, ticks: "outside",
    tickcolor: soft, title: { standoff: 8 },
  };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 11 : 13, color: text },
    margin: { l: 50, r: 15, t: 15, b: 40, pad: 0 },
    hovermode: "closest", uirevision: "kept", dragmode: touch.matches ? false : "zoom",
    hoverlabel: { font: { family: getComputedStyle(document.body).fontFamily } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: text } },
    xaxis: { ...axis, exponentformat: "none", ...xaxis, title: { ...axis.title, ...xaxis.title } },
    yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis.title } },
    ...rest,
  };
}

const CONFIG = {
  responsive: true, displayModeBar: false, scrollZoom: false, showTips: false,
};

/** A date and time of this machine from Unix seconds. */
function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** A new element with properties, attributes under ``attributes``, and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { attributes = {}, ...rest } = properties;
  Object.assign(made, rest);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
