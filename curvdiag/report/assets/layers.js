"use strict";
// The layers as a matrix: layer x step, for whichever quantity is chosen.

const LAYER_WORDS = {
  lambda_max: "λmax, largest eigenvalue of the layer's block",
  trace: "trace of the layer's block",
};

function quantityName(quantity) {
  return own(LAYER_WORDS, quantity) || quantity.replace("anisotropy/", "").replace(/_/g, " ");
}

function chosenQuantity() {
  const found = layerTable(state.run);
  return found.has(state.quantity) ? state.quantity : quantities(found)[0];
}

/** ``lambda_max`` and ``trace`` first. */
function quantities(found) {
  const first = Object.keys(LAYER_WORDS);
  const rank = (name) => (first.includes(name) ? first.indexOf(name) : first.length);
  return [...found.keys()].sort((a, b) => rank(a) - rank(b) || byNumber(a, b));
}

/** {layers, steps, rows}: values by layer, then step; undefined where nothing was measured. */
function layerMatrix() {
  const quantity = chosenQuantity();
  const layers = layerTable(state.run).get(quantity).slice().sort(byNumber);
  const found = layers.map((layer) => series(state.run, `curv/layer/${layer}/${quantity}`));
  const steps = [...new Set(found.flatMap((one) => one.steps))].sort((a, b) => a - b);
  const column = new Map(steps.map((step, i) => [step, i]));
  const rows = found.map((one) => {
    const row = new Array(steps.length).fill(undefined);
    one.steps.forEach((step, i) => { row[column.get(step)] = one.values[i]; });
    return row;
  });
  const errors = found.map((one) => new Map(one.steps.map((step, i) => [step, one.errors ? one.errors[i] : NaN])));
  return { quantity, layers, steps, rows, errors };
}

const layerFigure = {
  id: "layer-matrix",
  title: "",
  get caption() {
    return `${quantityName(chosenQuantity())}, by layer and step. The block of a layer is that of its own parameters.`;
  },
  height() {
    return Math.min(Math.max(90 + 22 * layerTable(state.run).get(chosenQuantity()).length, 200), 1100);
  },
  draw() {
    const { quantity, layers, steps, rows, errors } = layerMatrix();
    const values = rows.flat().filter(Number.isFinite);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const log = low > 0 && high > 10 * low;
    const size = Math.max(Math.abs(low), Math.abs(high));
    const names = distinct(layers);
    const length = narrow() ? 14 : 32;
    const scale = log
      ? { colorscale: densityScale(), zmin: Math.log10(low), zmax: Math.log10(high) }
      : low < 0 ? { colorscale: signedScale(), zmin: -size, zmax: size } : { colorscale: densityScale() };
    const bar = { thickness: narrow() ? 8 : 14, outlinewidth: 0, tickcolor: theme().soft,
      title: { text: quantity === "lambda_max" ? "λmax" : quantityName(quantity).split(" of ")[0], side: "right" },
      ...(log ? powerTicks(Math.log10(low), Math.log10(high)) : {}) };
    const shown = (value) => (Number.isFinite(value) ? (log ? Math.log10(value) : value) : null);
    const text = rows.map((row, i) => row.map((value, j) => {
      const error = errors[i].get(steps[j]);
      return short(value) + (error > 0 ? ` ± ${short(error, 2)} (standard error)` : "");
    }));
    const data = [{
      type: "heatmap", x: steps, y: layers.map((_, i) => i), z: rows.map((row) => row.map(shown)), text,
      customdata: layers.map((layer) => new Array(steps.length).fill(plain(cut(layer, 60)))), ...scale,
      hoverongaps: false, colorbar: bar,
      hovertemplate: "%{customdata}<br>step %{x}<br><b>%{text}</b><extra></extra>",
    }];
    const every = Math.ceil(layers.length / 70);
    const places = layers.map((_, i) => i).filter((i) => i % every === 0);
    const layout = {
      xaxis: { ...stepAxis(steps), showgrid: false, zeroline: false },
      yaxis: { tickvals: places, ticktext: places.map((i) => plain(cut(names[i], length))), showgrid: false,
        autorange: "reversed", zeroline: false },
      uirevision: chosenQuantity(),
    };
    return { data, layout: baseLayout(layout) };
  },
  alt() {
    const { quantity, layers, steps, rows } = layerMatrix();
    const last = layers.map((layer, i) => [layer, rows[i].filter(Number.isFinite).pop()]);
    const known = last.filter((one) => one[1] !== undefined).sort((a, b) => b[1] - a[1]);
    const top = known.slice(0, 3).map(([layer, value]) => `${layer} ${short(value)}`).join(", ");
    return `Matrix of ${quantityName(quantity)} for ${layers.length} layers at ${steps.length} steps. ` +
      `Largest at the end: ${top}. The numbers are in the table below.`;
  },
  table() {
    const { quantity, layers, steps, rows } = layerMatrix();
    return {
      caption: quantityName(quantity),
      head: ["step", ...layers],
      rows: steps.map((step, j) => [step, ...rows.map((row) => row[j])]),
    };
  },
};
