"use strict";
// Figures of numbers over steps, with their 95 % bands.

/** A figure with one or several lines. ``lines()`` gives [{label, steps, epochs, values, band?}].
 * ``level`` draws a dotted line across; ``capped`` ends the axis where the first line would be pressed flat. */
function lineFigure({ id, title, caption = "", yTitle = "", lines, table, level, capped = false }) {
  const figure = { id, title, caption, lines };
  figure.height = () => (capped ? 320 : 260) + 18 * Math.floor(lines().length / 3);
  figure.draw = () => drawLines(lines(), yTitle, level, capped);
  figure.alt = () => describe(title, lines());
  figure.table = table || (() => linesTable(title, lines()));
  return figure;
}

/** A series as a line of a figure. */
function asLine(one, label) {
  return { ...one, label: label || one.name };
}

function drawLines(lines, yTitle, level, capped) {
  const log = wantsLog(lines);
  const floor = log ? smallest(lines) / 10 : 0;
  const data = [];
  lines.forEach((line, index) => {
    const style = lineStyle(index);
    if (line.band && line.steps.length > 1) data.push(bandTrace(line, style.color, log, floor));
    data.push({
      type: "scatter", name: plain(cut(line.label, 44)), x: line.steps,
      y: line.values.map((value) => (Number.isFinite(value) && !(log && value <= 0) ? value : null)),
      mode: line.steps.length <= 60 ? "lines+markers" : "lines", line: style,
      marker: { size: 5, color: style.color }, text: hoverTexts(line, lines.length > 1),
      hovertemplate: "%{text}<extra></extra>", showlegend: lines.length > 1,
      ...(line.band && line.steps.length === 1 ? { error_y: { type: "data", array: line.band } } : {}),
    });
  });
  const yaxis = { title: { text: plain(cut(yTitle, 26)) }, type: log ? "log" : "linear", exponentformat: "power" };
  Object.assign(yaxis, valueRange(lines, log, capped));
  const shapes = level === undefined ? [] : [levelLine(level)];
  const annotations = finite(lines).length ? [] : [{ text: "no finite value", showarrow: false, xref: "paper", x: 0.5,
    yref: "paper", y: 0.5 }];
  const layout = { yaxis, shapes, annotations, xaxis: stepAxis(lines.flatMap((line) => line.steps)) };
  return { data, layout: baseLayout(layout) };
}

function levelLine(level) {
  return { type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level,
    line: { color: theme().soft, width: 1, dash: "dot" } };
}

function finite(lines) {
  return lines.flatMap((line) => line.values.filter(Number.isFinite));
}

function wantsLog(lines) {
  const values = finite(lines);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return low > 0 && high > 30 * low;
}

function smallest(lines) {
  return finite(lines).filter((value) => value > 0).reduce((a, b) => Math.min(a, b), Infinity);
}

/** Ends and ticks of the axis of values, where plotly would choose badly. */
function valueRange(lines, log, capped) {
  const values = finite(lines);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low === high) return { range: [low - (Math.abs(low) / 2 || 1), low + (Math.abs(low) / 2 || 1)] };
  if (!log) return {};
  const first = finite(lines.slice(0, 1)).reduce((a, b) => Math.max(a, b), 0);
  const range = {};
  if (capped && first > 0 && high > 100 * first) {
    high = 100 * first;
    range.range = [Math.log10(low) - 0.1, Math.log10(high)];
  }
  const decades = Math.log10(high / low);
  return decades > 1.2 ? { ...range, dtick: Math.ceil(decades / 6) } : range;
}

/** A filled band; a gap where no interval is known. On a logarithmic axis what reaches zero goes to the foot. */
function bandTrace(line, colour, log, floor) {
  const x = [];
  const y = [];
  let part = [];
  const close = () => {
    const back = part.slice().reverse();
    x.push(...part.map((p) => p.x), ...back.map((p) => p.x), null);
    y.push(...part.map((p) => p.high), ...back.map((p) => p.low), null);
    part = [];
  };
  line.steps.forEach((step, i) => {
    const low = line.values[i] - line.band[i];
    const high = line.values[i] + line.band[i];
    if (Number.isFinite(low) && Number.isFinite(high) && !(log && high <= 0)) {
      part.push({ x: step, low: log && low <= 0 ? floor : low, high });
    } else if (part.length) close();
  });
  if (part.length) close();
  return { type: "scatter", mode: "lines", x, y, fill: "toself", fillcolor: translucent(colour, 0.2),
    line: { width: 0 }, hoverinfo: "skip", showlegend: false };
}

function hoverTexts(line, named) {
  return line.steps.map((step, i) => {
    const band = line.band && Number.isFinite(line.band[i]) ? ` ± ${short(line.band[i], 2)} (95 %)` : "";
    const head = named ? `${plain(cut(line.label, 60))}<br>` : "";
    return `${head}${plain(when(step, line.epochs && line.epochs[i]))}<br><b>${short(line.values[i])}</b>${band}`;
  });
}

function when(step, epoch) {
  return Number.isFinite(epoch) ? `step ${step}, epoch ${short(epoch, 3)}` : `step ${step}`;
}

/** What a line chart shows, in a sentence for each line. */
function describe(title, lines) {
  const parts = lines.map((line) => {
    const values = line.values.filter(Number.isFinite);
    if (!values.length) return `${line.label}: no value`;
    const low = values.reduce((a, b) => Math.min(a, b));
    const high = values.reduce((a, b) => Math.max(a, b));
    const span = `from step ${line.steps[0]} to ${line.steps[line.steps.length - 1]}`;
    return `${line.label}: ${values.length} values ${span}, first ${short(values[0])}, last ` +
      `${short(values[values.length - 1])}, lowest ${short(low)}, highest ${short(high)}`;
  });
  return `Line chart, ${title}. ${parts.join(". ")}. The numbers are in the table below.`;
}

/** The numbers of lines by step, with standard errors where there are some. */
function linesTable(title, lines) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const columns = lines.flatMap((line) => {
    const at = new Map(line.steps.map((step, i) => [step, i]));
    const column = (label, values) => ({ label, at: (step) => (at.has(step) ? values[at.get(step)] : undefined) });
    return [column(line.label, line.values), ...(line.errors ? [column(`standard error`, line.errors)] : [])];
  });
  const thinned = lines.filter((line) => line.measured > line.steps.length);
  const note = thinned.length ? `; of ${thinned[0].measured} values ${thinned[0].steps.length} are kept here` : "";
  return {
    caption: `${title}${note}`,
    head: ["step", ...columns.map((one) => one.label)],
    rows: steps.map((step) => [step, ...columns.map((one) => one.at(step))]),
  };
}
