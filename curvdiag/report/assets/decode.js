"use strict";
// From the packed data to arrays, each once and when it is first needed.

const known = new WeakMap();

/** A typed array from base64 of its little-endian bytes. */
function unpack(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

/** A field of an object, unpacked once. */
function numbers(owner, field, Kind = Float64Array) {
  if (!known.has(owner)) known.set(owner, {});
  const found = known.get(owner);
  if (!(field in found)) found[field] = owner[field] === undefined ? null : Array.from(unpack(owner[field], Kind));
  return found[field];
}

/** One scalar over a run: {name, steps, epochs, values, errors, band, measured}, or null. */
function series(run, name) {
  if (!known.has(run)) known.set(run, {});
  const found = known.get(run);
  if (!found.byName) found.byName = new Map(run.scalars.map((one) => [one.name, one]));
  const one = found.byName.get(name);
  if (!one) return null;
  const axis = run.axes[one.axis];
  return {
    name,
    steps: numbers(axis, "steps"),
    epochs: numbers(axis, "epochs"),
    values: numbers(one, "values"),
    errors: numbers(one, "errors", Float32Array),
    band: numbers(one, "band", Float32Array),
    measured: one.measured || 0,
  };
}

/** The names that begin so. */
function namesUnder(run, prefix) {
  return run.scalars.map((one) => one.name).filter((name) => name.startsWith(prefix));
}

/** All series under a prefix. */
function seriesUnder(run, prefix) {
  return namesUnder(run, prefix).map((name) => series(run, name));
}

/** The levels of a density at one time, 0 for what lies below the floor. */
function levelsAt(density, index) {
  if (!known.has(density)) known.set(density, {});
  const found = known.get(density);
  if (!found.grid) found.grid = unpack(density.levels, Uint8Array);
  return found.grid.subarray(index * density.cells, (index + 1) * density.cells);
}

/** The density that a level stands for. */
function densityOf(density, level) {
  return level ? Math.exp(density.floor + ((level - 1) * (density.top - density.floor)) / 254) : 0;
}

/** Positions of the cells on the axis of a density. */
function positionsOf(density) {
  const [first, last] = density.positions;
  return Array.from({ length: density.cells }, (_, i) => first + ((last - first) * i) / (density.cells - 1));
}

/** Index of the entry of a sorted array that is nearest to a value. */
function nearest(sorted, value) {
  let best = 0;
  sorted.forEach((one, index) => {
    if (Math.abs(one - value) < Math.abs(sorted[best] - value)) best = index;
  });
  return best;
}

/** The last value at or before a step; NaN where there is none. */
function valueAt(one, step) {
  let found = NaN;
  if (one) {
    for (let i = 0; i < one.steps.length && one.steps[i] <= step; i += 1) found = one.values[i];
  }
  return found;
}

/** The layer's quantities: {layers: in the order recorded, quantities: {name: [layer, ...]}}. */
function layerTable(run) {
  const ends = /^curv\/layer\/(.+?)\/((?:anisotropy\/)?[^/]+)$/;
  const quantities = new Map();
  for (const name of namesUnder(run, "curv/layer/")) {
    const match = ends.exec(name);
    if (!match) continue;
    if (!quantities.has(match[2])) quantities.set(match[2], []);
    quantities.get(match[2]).push(match[1]);
  }
  return quantities;
}
