"use strict";
// The edge of stability: how large the learning rate times the eigenvalue may be, by the optimizer's rule.

const EDGES = {
  descent: { label: "2 / lr", factor: () => 2 },
  "heavy ball": { label: "2 (1 + β) / lr, heavy ball", factor: (beta) => 2 * (1 + beta) },
  Nesterov: { label: "2 (1 + β) / ((1 + 2 β) lr), Nesterov", factor: (beta) => (2 * (1 + beta)) / (1 + 2 * beta) },
  averaged: { label: "2 (1 + β) / ((1 − β) lr), averaged momentum", factor: (beta) => (2 * (1 + beta)) / (1 - beta) },
};

const PRECONDITIONED = { LPSGD: ["descent"], LPSGDM: ["averaged"], Adam: ["averaged"], AdamW: ["averaged"] };

/** The optimizer as the monitor recorded it, or an empty string. */
function optimizerOf(run) {
  const own = run.config && run.config.curvdiag;
  return own && typeof own.optimizer === "string" ? own.optimizer : "";
}

/** The names of the edges that hold for the eigenvalue of a run, the sharpest last; none where it is not its edge. */
function edgesOf(run, preconditioned) {
  const rule = optimizerOf(run);
  const divides = Object.hasOwn(PRECONDITIONED, rule);
  if (divides) return preconditioned ? PRECONDITIONED[rule] : [];
  if (!rule) return ["descent", preconditioned ? "averaged" : "heavy ball"];
  const kind = rule.slice("SGD, ".length);
  return rule.startsWith("SGD, ") && own(EDGES, kind) ? ["descent", kind] : ["descent"];
}

/** Whether the last of these edges is that of the run's own optimizer. */
function knowsEdge(run) {
  const rule = optimizerOf(run);
  return ["SGD", "SGD, heavy ball", "SGD, Nesterov"].includes(rule) || Object.hasOwn(PRECONDITIONED, rule);
}

/** An eigenvalue over the run with its edges, for the first groups of parameters. */
function edgeLines(run, key, preconditioned) {
  const lines = [asLine(series(run, key), "λmax")];
  const groups = namesUnder(run, "train/lr/").map((name) => name.slice("train/lr/".length));
  const seen = new Set();
  for (const group of groups.slice(0, 3)) {
    const lr = series(run, `train/lr/${group}`);
    const momentum = series(run, `train/momentum/${group}`);
    const moving = momentum !== null && momentum.values.some((beta) => beta > 0);
    const of = groups.length > 1 ? `, group ${group}` : "";
    const names = edgesOf(run, preconditioned);
    for (const name of moving || names.length === 1 ? names : names.slice(0, 1)) {
      const { label, factor } = EDGES[name];
      const values = lr.values.map((rate, i) => (rate > 0
        ? factor(momentum ? valueAt(momentum, lr.steps[i]) : 0) / rate : NaN));
      if (seen.has(label + values.join())) continue; // groups with one rate have one edge
      seen.add(label + values.join());
      lines.push({ label: label + of, steps: lr.steps, epochs: lr.epochs, values });
    }
  }
  return lines;
}

/** The last ``lr λmax`` in words, with the edge where the optimizer's is known: [name, value], or null. */
function edgeFact(run) {
  const rates = namesUnder(run, "train/lr/");
  for (const [key, preconditioned, name] of EIGENVALUES) {
    const found = series(run, key);
    const edges = edgesOf(run, preconditioned);
    const other = knowsEdge(run) && preconditioned !== Object.hasOwn(PRECONDITIONED, optimizerOf(run));
    if (!found || rates.length !== 1 || !edges.length || other) continue;
    const at = found.steps.length - 1;
    const value = valueAt(series(run, rates[0]), found.steps[at]) * found.values[at];
    const beta = valueAt(series(run, rates[0].replace("/lr/", "/momentum/")), found.steps[at]) || 0;
    const edge = knowsEdge(run) ? ` (edge ${short(EDGES[edges[edges.length - 1]].factor(beta))})` : "";
    if (Number.isFinite(value)) return [`lr · ${name}`, short(value) + edge];
  }
  return null;
}

const EIGENVALUES = [
  ["curv/preconditioned/lambda_max", true, "preconditioned λmax"], ["curv/hessian/lambda_max", false, "λmax"],
];

function edgeFigures(has) {
  return EIGENVALUES.filter(([key]) => has(key)).map(([key, preconditioned]) => {
    const title = preconditioned ? "Of the preconditioned Hessian" : "Of the Hessian";
    const lines = () => edgeLines(state.run, key, preconditioned);
    const table = () => {
      const [first, ...edges] = lines();
      const residual = series(state.run, `${key}_residual`);
      return linesTable(title, residual ? [first, asLine(residual, "residual"), ...edges] : [first, ...edges]);
    };
    return lineFigure({ id: preconditioned ? "preconditioned" : "lambda-max", title, yTitle: "eigenvalue",
      caption: edgeCaption(state.run, preconditioned), capped: true, lines, table });
  }).reverse();
}

function edgeCaption(run, preconditioned) {
  const rule = optimizerOf(run);
  if (!edgesOf(run, preconditioned).length) {
    return `${rule} divides its steps by D: its edge is that of the preconditioned Hessian, which a monitor measures ` +
      "as \"preconditioned_lambda_max\".";
  }
  return rule && !knowsEdge(run) ? `The edges are those of gradient descent; those of ${rule} are not known here.` : "";
}
