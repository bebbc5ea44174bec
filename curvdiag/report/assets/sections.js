"use strict";
// Which sections the page has: those for which the run holds data.

const ANISOTROPY = {
  top_ratio: ["Top ratio", "λ₁ / λ₅. Rises with anisotropy from 1."],
  condition_number: ["Condition number", "λmax / λmin. Rises with anisotropy from 1."],
  bulk_ratio: ["Bulk ratio", "λmax over the edge of the bulk. Rises with anisotropy from 1."],
  stable_rank: ["Stable rank", "tr H² / ‖H‖². Falls with anisotropy to 1."],
  participation_ratio: ["Participation ratio", "(tr H)² / tr H². Falls with anisotropy."],
  intrinsic_dimension: ["Intrinsic dimension", "tr |H| / λmax. Falls with anisotropy to 1."],
  effective_rank: ["Effective rank", "Exponential of the entropy of |λ| / Σ|λ|. Falls with anisotropy to 1."],
  negative_mass: ["Negative mass", "Share of Σ|λ| in negative eigenvalues. 0 where H is positive semi-definite."],
};

const NOISE = {
  scale: ["Noise scale", "tr C / |g|², in samples: batches much smaller than this are mostly noise."],
  scale_curvature: ["Noise scale with curvature", "tr(HC) / (gᵀHg), in samples."],
  trace: ["tr C", "Variance of the gradient of a single sample, over the population."],
  trace_hc: ["tr(HC)", "Of the probe set."],
  gradient_square: ["|g|²", "Of the population, without bias; may be negative."],
  gradient_curvature: ["gᵀHg", "Of the population, without bias; may be negative."],
  gradient_square_probe: ["|g|² of the probe set", "With the noise of its mean gradient."],
  gradient_curvature_probe: ["gᵀHg of the probe set", "With the noise of its mean gradient."],
  cwgd: ["CWGD", "Curvature-weighted gradient diversity, 2 tr((|H| + δ)⁻¹ C)."],
  cwgd_diagonal: ["CWGD, diagonal form", "Curvature-weighted gradient diversity, 2 Σ C_kk / |H_kk|."],
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
  sharpness_capped: "SharpnessCappedLR: another schedule's rate, but at most cap = fraction · limit / λmax, below " +
    "the edge of stability.",
};

/** The sections for this run, each {id, title, note, figures, pairs, parts}. */
function sectionsOf(run) {
  const has = (name) => series(run, name) !== null;
  const get = (name) => series(state.run, name);
  const one = (id, name, title, caption = "", more = {}) => has(name)
    ? lineFigure({ id, title, caption, yTitle: title, lines: () => [asLine(get(name), name)], ...more }) : null;
  const used = new Set(["train/loss", "curv/hessian/lambda_max", "curv/hessian/lambda_max_residual",
    "curv/hessian/trace", "curv/overhead", "curv/preconditioned/lambda_max",
    "curv/preconditioned/lambda_max_residual"]);
  const rest = (prefix, words, pick = () => true) => namesUnder(run, prefix).filter(pick).map((name) => {
    used.add(name);
    const key = name.slice(prefix.length);
    const [title, caption] = own(words, key) || [capital(key.replace(/_/g, " ")), ""];
    return one(`n-${name}`, name, title, caption);
  }).sort((a, b) => rank(words, prefix, a) - rank(words, prefix, b));
  const made = [
    section("spectrum-section", "Spectrum over time", SPECTRUM_NOTE,
      run.densities.length ? [heatmapFigure, spectrumFigure] : [], { slider: true }),
    section("edge", "Largest eigenvalue and the edge of stability", EDGE_NOTE, edgeFigures(has),
      { link: "Edge of stability" }),
    section("trace", "Trace and norm", "", [one("trace-line", "curv/hessian/trace", "tr H", TRACE),
      ...rest("curv/hessian/", HESSIAN, (name) => !used.has(name))], { pairs: true }),
    section("anisotropy", "Anisotropy", "How unequal the eigenvalues are, by several measures.",
      rest("curv/anisotropy/", ANISOTROPY), { pairs: true }),
    section("layers", "Layers", "", layerTable(run).size ? [layerFigure] : [], { quantities: true }),
    section("noise", "Gradient noise", NOISE_NOTE, rest("noise/", NOISE), { pairs: true }),
    section("align", "C against H", ALIGN_NOTE, alignFigures(run, used), { pairs: true }),
    section("settings", "Learning rate, momentum and p", "", SETTINGS.map(([key, title]) =>
      groupFigure(run, used, `train/${key}/`, key, title)), { pairs: true }),
    ...scheduleSections(run, used),
    section("loss", "Training loss", "", [one("loss-line", "train/loss", "Loss")]),
    section("cost", "Cost of measuring", "", [...rest("curv/cost/", COST), one("overhead", "curv/overhead",
      ...COST.overhead)], { pairs: true }),
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
  "(Adam, LPSGD) the eigenvalue is that of D^(−½) H D^(−½). β is the momentum.";
const ALIGN_NOTE = "Is the gradient noise shaped like the curvature? γ is the exponent in C ~ H^γ: 1 where the noise " +
  "is proportional to the curvature. Baselines have random eigenvectors and the same spectra.";
const TRACE = "Sum of the eigenvalues, with its 95 % interval.";
const HESSIAN = {
  frobenius_norm: ["Frobenius norm", "(tr H²)^½, with its 95 % interval."],
  lambda_min: ["λmin", "Smallest Ritz value of the density's probes."],
};
const COST = {
  seconds: ["Seconds", "Time of one measurement."],
  gradients: ["Gradients", "Time of one measurement, in gradients of the objective."],
  matvecs: ["Products", "With H and C, in one measurement."],
  overhead: ["Overhead", "Share of the run's time spent measuring so far."],
};

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Figures in the order of their words; those without any last. */
function rank(words, prefix, figure) {
  const at = Object.keys(words).indexOf(figure.id.slice(`n-${prefix}`.length));
  return at < 0 ? Infinity : at;
}

function section(id, title, note, figures, more = {}) {
  const shown = figures.filter(Boolean);
  return shown.length || (more.parts && more.parts.length) ? { id, title, note, figures: shown, ...more } : null;
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
      id: `n-${name}`, title: gamma ? key.replace("gamma", "γ, exponent of C ~ H^γ") : capital(key.replace(/_/g, " ")),
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
    const words = (key) => (key === "lambda_max" ? "λmax" : key.replace(/_/g, " "));
    const titled = (key) => `${isChosen(key) ? "Chose" : "Saw"}: ${words(key)}`;
    const figures = keys.map((key) => groupFigure(run, used, `${prefix}${key}`, key, titled(key),
      () => scheduleTable(schedule)));
    const rule = own(RULES, schedule) || "";
    const [owner] = rule.split(":");
    const held = run.events.filter(([, kind, message]) => kind === "schedule" && message.startsWith(`${owner}: `));
    const rows = held.reverse().map(([step, , message]) => [step, message.slice(owner.length + 2)]);
    const parts = owner && rows.length ? [{ caption: "When it held what it had, and why; the latest first",
      head: ["step", "why"], rows }] : [];
    return section(`schedule-${schedule}`, `Schedule: ${schedule.replace(/_/g, " ")}`, rule, figures,
      { pairs: true, parts });
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
  return linesTable(`${schedule.replace(/_/g, " ")}: what it saw and chose. ${own(RULES, schedule) || ""}`, lines);
}
