"use strict";
// Eigenvalue densities: the heatmap over time, and the density at the chosen step.

/** The density series that is shown. */
function chosenDensity() {
  const { run, block } = state;
  return run.densities.find((one) => densityName(one) === block) || wholeFirst(run.densities)[0];
}

function densityName(one) {
  const name = capital(one.operator.replace(/[_-]/g, " "));
  return one.block ? `${name} of ${one.block}` : name;
}

/** Whole models before their blocks, these in the order of their names and numbers. */
function wholeFirst(densities) {
  return densities.slice().sort((a, b) => Boolean(a.block) - Boolean(b.block) ||
    a.operator.localeCompare(b.operator) || byNumber(a.block, b.block));
}

function byNumber(a, b) {
  return a.localeCompare(b, "en", { numeric: true });
}

/** Index of the time shown: the step that the user chose, or the last. */
function chosenTime(density) {
  const steps = numbers(density, "steps");
  return state.follow ? steps.length - 1 : nearest(steps, state.step);
}

function eigenvalueAxis(density) {
  const every = narrow() && density.ticks.length > 7 ? 2 : 1;
  const ticks = density.ticks.filter((_, i) => (density.ticks.length - 1 - i) % every === 0);
  return { tickvals: ticks.map((tick) => tick[0]), ticktext: ticks.map((tick) => tick[1]), zeroline: false };
}

function eigenvalueNames(density) {
  if (!known.has(density)) known.set(density, {});
  const found = known.get(density);
  if (!found.names) found.names = numbers(density, "centres").map((value) => short(value, 3));
  return found.names;
}

const heatmapFigure = {
  id: "heatmap",
  title: "Over the whole run",
  get caption() {
    const density = chosenDensity();
    const kept = numbers(density, "steps").length;
    const thinned = kept < density.measured ? ` Of ${density.measured} measurements ${kept} are kept here.` : "";
    return `Density of the eigenvalues of the ${lower(densityName(density))}, ${density.unit}; eigenvalues on a ` +
      `${density.scale} axis. Colours begin at a twentieth of the height of one single eigenvalue.${thinned}`;
  },
  height: () => (narrow() ? 340 : 440),
  draw() {
    const density = chosenDensity();
    const steps = numbers(density, "steps");
    const names = eigenvalueNames(density);
    const logs = Array.from({ length: 256 }, (_, level) => Math.log10(densityOf(density, level)));
    const words = logs.map((log) => short(10 ** log, 2));
    const columns = steps.map((_, i) => levelsAt(density, i));
    const rows = names.map((_, cell) => columns.map((levels) => levels[cell]));
    const low = density.floor / Math.LN10;
    const high = density.top / Math.LN10;
    const bar = { ...powerTicks(low, high), title: { text: "density", side: "right" }, thickness: narrow() ? 8 : 14,
      outlinewidth: 0, tickcolor: theme().soft };
    const data = [{
      type: "heatmap", x: steps, y: positionsOf(density), hoverongaps: false, colorscale: densityScale(),
      z: rows.map((row) => row.map((level) => (level ? logs[level] : null))), zmin: low, zmax: high,
      text: rows.map((row) => row.map((level) => words[level])),
      customdata: names.map((name) => new Array(steps.length).fill(name)),
      hovertemplate: "step %{x}<br>eigenvalue %{customdata}<br>density %{text}<extra></extra>", colorbar: bar,
    }];
    const layout = {
      shapes: [stepLine(density)], xaxis: { ...stepAxis(steps), showgrid: false, zeroline: false },
      yaxis: { title: { text: "eigenvalue" }, showgrid: false, ...eigenvalueAxis(density) },
      uirevision: densityName(density),
    };
    return { data, layout: baseLayout(layout) };
  },
  alt() {
    const density = chosenDensity();
    const steps = numbers(density, "steps");
    const low = numbers(density, "lowest");
    const high = numbers(density, "highest");
    const last = steps.length - 1;
    return `Heatmap of the eigenvalue density of the ${lower(densityName(density))} at ${steps.length} steps from ` +
      `${steps[0]} to ${steps[last]}. Eigenvalues range from ${short(low[0])} to ${short(high[0])} at the first and ` +
      `from ${short(low[last])} to ${short(high[last])} at the last. The ends are in the table below.`;
  },
  table() {
    const density = chosenDensity();
    const epochs = numbers(density, "epochs");
    const [low, high] = [numbers(density, "lowest"), numbers(density, "highest")];
    return {
      caption: `Ends of the spectrum of the ${lower(densityName(density))}`,
      head: ["step", "epoch", "lowest Ritz value", "highest Ritz value"],
      rows: numbers(density, "steps").map((step, i) => [step, epochs[i], low[i], high[i]]),
    };
  },
  ready(div) {
    div.on("plotly_click", (event) => chooseStep(event.points[0].x));
  },
};

function lower(name) {
  return name.startsWith("Hessian") ? name : name.charAt(0).toLowerCase() + name.slice(1);
}

function stepLine(density) {
  const step = numbers(density, "steps")[chosenTime(density)];
  const line = { color: isDark() ? "#56B4E9" : "#0072B2", width: 2, dash: "dot" };
  return { type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line };
}

const spectrumFigure = {
  id: "spectrum",
  title: "At the chosen step",
  get caption() {
    return `Density of the eigenvalues, ${chosenDensity().unit}, on a logarithmic scale that is one for all steps.`;
  },
  height: () => (narrow() ? 280 : 340),
  draw() {
    const density = chosenDensity();
    const index = chosenTime(density);
    const step = numbers(density, "steps")[index];
    const heights = Array.from(levelsAt(density, index), (level) => densityOf(density, level));
    const style = lineStyle(1);
    const floor = Math.exp(density.floor);
    const names = eigenvalueNames(density);
    const x = positionsOf(density);
    const data = [
      { type: "scatter", x, y: heights.map(() => floor), mode: "lines", line: { width: 0 }, hoverinfo: "skip",
        showlegend: false },
      { type: "scatter", x, y: heights.map((height) => height || floor), mode: "lines", fill: "tonexty",
        fillcolor: translucent(style.color, 0.2), line: { color: style.color, width: 1.6 }, showlegend: false,
        text: heights.map((height, i) => `eigenvalue ${names[i]}<br>density ${height ? short(height, 2) : "too low"}`),
        hovertemplate: `step ${step}<br>%{text}<extra></extra>` },
    ];
    const decades = (density.top - density.floor) / Math.LN10;
    const layout = {
      hovermode: "x",
      xaxis: { title: { text: "eigenvalue" }, ...eigenvalueAxis(density) },
      yaxis: { title: { text: "density" }, type: "log", exponentformat: "power", dtick: Math.ceil(decades / 6),
        range: [density.floor / Math.LN10, density.top / Math.LN10 + 0.04 * decades] },
      uirevision: densityName(density),
    };
    return { data, layout: baseLayout(layout) };
  },
  alt() {
    const density = chosenDensity();
    const index = chosenTime(density);
    const share = levelsAt(density, index).reduce((count, level) => count + (level > 0), 0);
    const step = numbers(density, "steps")[index];
    return `Eigenvalue density of the ${lower(densityName(density))} at step ${step}: from ` +
      `${short(numbers(density, "lowest")[index])} to ${short(numbers(density, "highest")[index])}, in ${share} of ` +
      `${density.cells} cells of the axis. The numbers are in the table below.`;
  },
  table() {
    const density = chosenDensity();
    const index = chosenTime(density);
    const centres = numbers(density, "centres");
    const rows = Array.from(levelsAt(density, index), (level, i) => [centres[i], densityOf(density, level)]);
    return {
      caption: `Density at step ${numbers(density, "steps")[index]}, ${density.unit}, to about ` +
        `${short((100 * (density.top - density.floor)) / 254, 2)} %`,
      head: ["eigenvalue", "density"],
      rows: rows.filter((row) => row[1] > 0),
    };
  },
};

/** What the slider says beside itself: the step, and the headlines there. */
function stepInWords(density) {
  const index = chosenTime(density);
  const step = numbers(density, "steps")[index];
  const [low, high] = [numbers(density, "lowest")[index], numbers(density, "highest")[index]];
  const parts = [when(step, numbers(density, "epochs")[index]), `eigenvalues ${short(low)} to ${short(high)}`];
  const loss = valueAt(series(state.run, "train/loss"), step);
  if (Number.isFinite(loss)) parts.push(`loss ${short(loss)}`);
  return parts.join("; ");
}
