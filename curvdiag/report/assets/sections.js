"use strict";
// Which sections the page has: those for which the run holds data.

const ANISOTROPY = {
  top_ratio: ["λ₁ / λ₅", "rises with anisotropy from 1"],
  condition_number: ["λmax / λmin", "rises from 1"],
  bulk_ratio: ["λmax over the edge of the bulk", "rises from 1"],
  stable_rank: ["‖H‖²F / ‖H‖²", "falls with anisotropy to 1"],
  participation_ratio: ["(tr H)² / tr H²", "falls with anisotropy"],
  intrinsic_dimension: ["tr |H| / λmax", "falls with anisotropy to 1"],
  effective_rank: ["exp of the entropy of |λ| / Σ|λ|", "falls with anisotropy to 1"],
  negative_mass: ["share of Σ|λ| in negative eigenvalues", "rises from 0"],
};

const NOISE = {
  scale: "B_simple = tr C / |g|², in samples: batches much smaller than this are mostly noise",
  scale_curvature: "B_noise = tr(HC) / (gᵀHg), in samples",
  trace: "tr C of the population, of single samples",
  trace_hc: "tr(HC)",
  gradient_square: "|g|² of the population, without bias",
  gradient_curvature: "gᵀHg of the population, without bias",
  gradient_square_probe: "|g|² of the probe set",
  gradient_curvature_probe: "gᵀHg of the probe set",
  cwgd: "curvature-weighted gradient diversity, 2 tr((|H| + δ)⁻¹ C)",
  cwgd_diagonal: "curvature-weighted gradient diversity, diagonal form: 2 Σ C_kk / |H_kk|",
};

const RULES = {
  anisotropy_p: "AnisotropyP: p follows the measured anisotropy a of the curvature, from 2 where it is isotropic to " +
    "p_max where it is as anisotropic as a_high.",
  predicted_decrease_p: "PredictedDecreaseP: of the candidates for p the winner is the one whose direction promises " +
    "the largest decrease of the loss, by slope and curvature (decrease/<p>); p follows the winner, smoothed.",
  anisotropy: "AnisotropyLR: another schedule's rate times a factor, (a / a_ref)^∓k of the measured anisotropy a, " +
    "smoothed and within bounds.",
  noise_curvature: "NoiseCurvatureLR: lr = scale · |g|² / (gᵀHg + tr(HC) / B), the best step on the measured " +
    "quadratic with its noise.",
  cwgd_cosine: "CWGDCosineLR: the cosine's rate divided by 1 + α · CWGD / (its first value).",
  sharpness_capped: "SharpnessCappedLR: another schedule's rate, but at most cap = fraction · limit / λmax, below the " +
    "edge of stability.",
};

/** The sections for this run, each {id, title, note, figures, pairs, parts}. */
function sectionsOf(run) {
  const has = (name) => series(run, name) !== null;
  const get = (name) => series(state.run, name);
  const one = (id, name, title, caption = "", more = {}) => has(name)
    ? lineFigure({ id, title, caption, yTitle: title, lines: () => [asLine(get(name), name)], ...more }) : null;
  const used = new Set(["train/loss", "curv/hessian/lambda_max", "curv/hessian/lambda_max_residual",
    "curv/hessian/trace", "curv/overhead", "curv/preconditioned/lambda_max", "curv/preconditioned/lambda_max_residual"]);
  const rest = (prefix, words, pick = () => true) => namesUnder(run, prefix).filter(pick).map((name) => {
    used.add(name);
    const key = name.slice(prefix.length);
    const [caption, way] = [].concat(words[key] || "");
    return one(`n-${name}`, name, key.replace(/_/g, " "), [caption, way].filter(Boolean).join("; "));
  });
  const made = [
    section("spectrum-section", "Spectrum over time", SPECTRUM_NOTE,
      run.densities.length ? [heatmapFigure, spectrumFigure] : [], { slider: true }),
    section("edge", "Largest eigenvalue and the edge of stability", EDGE_NOTE, edgeFigures(has),
      { link: "Edge of stability" }),
    section("trace", "Trace", "", [one("trace-line", "curv/hessian/trace", "tr H", "With its 95 % interval."),
      ...rest("curv/hessian/", HESSIAN, (name) => !used.has(name))], { pairs: true }),
    section("anisotropy", "Anisotropy", "How unequal the eigenvalues are, by several measures.",
      rest("curv/anisotropy/", ANISOTROPY), { pairs: true }),
    section("layers", "Layers", "", layerTable(run).size ? [layerFigure] : [], { quantities: true }),
    section("noise", "Gradient noise", NOISE_NOTE, rest("noise/", NOISE), { pairs: true }),
    section("align", "C against H", ALIGN_NOTE, alignFigures(run, used), { pairs: true }),
    section("settings", "Learning rate, momentum and p", "", SETTINGS.map(([key, title]) =>
      groupFigure(run, used, `train/${key}/`, key, title)), { pairs: true }),
    ...scheduleSections(run, used),
    section("loss", "Training loss", "", [one("loss-line", "train/loss", "loss")]),
    section("cost", "Cost of measuring", "", [...rest("curv/cost/", COST), one("overhead", "curv/overhead", "overhead",
      COST.overhead)], { pairs: true }),
  ];
  namesUnder(run, "curv/layer/").forEach((name) => used.add(name));
  const others = run.scalars.map((scalar) => scalar.name).filter((name) => !used.has(name));
  const left = others.length > OTHERS ? `The first ${OTHERS} of ${others.length}.` : "";
  made.push(section("others", "Other numbers", left,
    others.slice(0, OTHERS).map((name) => one(`n-${name}`, name, name)), { pairs: true }));
  made.push(...textSections(run));
  return made.filter(Boolean);
}

const OTHERS = 40; // figures of numbers that the page has no words for
const LINES = 14; // in one figure
const SETTINGS = [["lr", "Learning rate"], ["momentum", "Momentum"], ["p", "p of the l_p geometry"]];
const SPECTRUM_NOTE = "Move the slider, click into the heatmap, or use the arrow keys on the slider to choose a step.";
const NOISE_NOTE = "C is the covariance of the gradients of single samples. Where a value is missing, the probe set " +
  "was too small to tell.";
const EDGE_NOTE = "On a quadratic, gradient descent is stable where λmax < 2 / lr, with heavy-ball momentum β where " +
  "λmax < 2 (1 + β) / lr; many networks train close to that edge. For optimizers that divide their steps by D " +
  "(Adam, LPSGD) the eigenvalue is that of D^(−1/2) H D^(−1/2).";
const ALIGN_NOTE = "Is the gradient noise shaped like the curvature? γ is the exponent in C ~ H^γ: 1 where the noise is " +
  "proportional to the curvature. Baselines have random eigenvectors and the same spectra.";
const HESSIAN = {
  lambda_min: "Smallest Ritz value of the density's probes.", frobenius_norm: "With its 95 % interval.",
};
const COST = { seconds: "of one measurement", gradients: "one measurement in gradients of the objective",
  matvecs: "products with H and C in one measurement", overhead: "share of the run's time spent measuring so far" };

function section(id, title, note, figures, more = {}) {
  const shown = figures.filter(Boolean);
  return shown.length || (more.parts && more.parts.length) ? { id, title, note, figures: shown, ...more } : null;
}

function edgeFigures(has) {
  const figure = (id, title, key, limits) => lineFigure({
    id, title, yTitle: "eigenvalue", capped: true, lines: () => edgeLines(state.run, key, limits),
    table: () => edgeTable(title, key, limits),
  });
  const [plainKey, scaledKey] = ["curv/hessian/lambda_max", "curv/preconditioned/lambda_max"];
  return [
    has(plainKey) ? figure("lambda-max", "Of the Hessian", plainKey, plainLimits) : null,
    has(scaledKey) ? figure("preconditioned", "Of the preconditioned Hessian", scaledKey, preconditionedLimits) : null,
  ];
}

function edgeTable(title, key, limits) {
  const lines = edgeLines(state.run, key, limits);
  const residual = series(state.run, `${key}_residual`);
  return linesTable(title, residual ? [lines[0], asLine(residual, "residual"), ...lines.slice(1)] : lines);
}

/** gamma by itself with a line at 1; what has a baseline together with it; the rest one by one. */
function alignFigures(run, used) {
  const names = namesUnder(run, "align/");
  names.forEach((name) => used.add(name));
  const get = (name) => series(state.run, name);
  const figures = [];
  for (const name of names.filter((one) => !one.endsWith("_baseline"))) {
    const key = name.slice("align/".length);
    const baseline = names.includes(`${name}_baseline`) ? `${name}_baseline` : null;
    const gamma = key.split("/").includes("gamma");
    figures.push(lineFigure({
      id: `n-${name}`, title: gamma ? key.replace("gamma", "γ, exponent of C ~ H^γ") : key.replace(/_/g, " "),
      yTitle: gamma ? "γ" : key, level: gamma ? 1 : undefined,
      caption: gamma ? "The dotted line is 1: noise proportional to the curvature." : "",
      lines: () => [asLine(get(name), key), ...(baseline ? [asLine(get(baseline), "baseline")] : [])],
    }));
  }
  return figures.sort((a, b) => b.title.includes("γ") - a.title.includes("γ"));
}

/** A section for each schedule: its rule, what it saw, what it chose. */
function scheduleSections(run, used) {
  const names = namesUnder(run, "schedule/");
  return [...new Set(names.map((name) => name.split("/")[1]))].map((schedule) => {
    const prefix = `schedule/${schedule}/`;
    const keys = [...new Set(names.filter((name) => name.startsWith(prefix)).map((name) => name.split("/")[2]))];
    keys.sort((a, b) => isChosen(a) - isChosen(b) || byNumber(a, b));
    const figures = keys.map((key) => groupFigure(run, used, `${prefix}${key}`, key,
      `${isChosen(key) ? "Chose" : "Saw"}: ${key.replace(/_/g, " ")}`, () => scheduleTable(schedule)));
    return section(`schedule-${schedule}`, `Schedule: ${schedule.replace(/_/g, " ")}`, RULES[schedule] || "", figures,
      { pairs: true });
  });
}

function isChosen(key) {
  return ["p", "lr", "factor", "divisor", "rate", "cap", "winner"].includes(key);
}

/** One figure with a line for each name at or under a prefix; null where there is none. */
function groupFigure(run, used, prefix, key, title, table) {
  const under = prefix.endsWith("/") ? prefix : `${prefix}/`;
  const names = run.scalars.map((one) => one.name).filter((name) => name === prefix || name.startsWith(under));
  if (!names.length) return null;
  names.forEach((name) => used.add(name));
  names.sort(byNumber);
  const label = (name) => (name === prefix ? key : `${key} ${name.slice(under.length)}`);
  return lineFigure({
    id: `n-${prefix}`, title, yTitle: key, table,
    caption: names.length > LINES ? `The first ${LINES} of ${names.length}.` : "",
    lines: () => names.slice(0, LINES).map((name) => asLine(series(state.run, name), label(name))),
  });
}

/** What a schedule saw and what it chose, side by side. */
function scheduleTable(schedule) {
  const prefix = `schedule/${schedule}/`;
  const lines = seriesUnder(state.run, prefix).map((one) => {
    const key = one.name.slice(prefix.length);
    return asLine(one, `${isChosen(key.split("/")[0]) ? "chose" : "saw"} ${key}`);
  });
  lines.sort((a, b) => b.label.startsWith("saw") - a.label.startsWith("saw") || byNumber(a.label, b.label));
  return linesTable(`${schedule.replace(/_/g, " ")}: what it saw and chose. ${RULES[schedule] || ""}`, lines);
}
