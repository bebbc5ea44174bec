"use strict";
// Tables: the numbers under the figures, and what a run says in words.

const ROWS = 500;

/** A table from {caption, head, rows}; long ones are thinned evenly, and say so. */
function tableElement({ caption, head, rows }) {
  const every = Math.ceil(rows.length / ROWS);
  const shown = every > 1 ? rows.filter((_, i) => i % every === 0 || i === rows.length - 1) : rows;
  const more = every > 1 ? `; every ${every}th of ${rows.length} rows` : "";
  const isNumber = head.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const cell = (value, i) => {
    const text = typeof value === "number" ? short(value, 6) : String(value ?? "–");
    const properties = { textContent: text, className: isNumber[i] ? "number" : "" };
    return i === 0 ? element("th", { ...properties, attributes: { scope: "row" } }) : element("td", properties);
  };
  return element("div", { className: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": caption } },
    element("table", {},
      element("caption", { textContent: caption + more }),
      element("thead", {}, element("tr", {}, ...head.map((text, i) =>
        element("th", { textContent: text, className: isNumber[i] ? "number" : "", attributes: { scope: "col" } })))),
      element("tbody", {}, ...shown.map((row) => element("tr", {}, ...row.map(cell))))));
}

/** Events, configuration and versions: tables that are always open. */
function textSections(run) {
  const events = run.events.slice().reverse().map(([step, kind, message, time]) => [step, kind, message, moment(time)]);
  const left = run.events_in_all - run.events.length;
  const config = flat(run.config);
  const parts = (...tables) => tables.filter((table) => table.rows.length);
  return [
    section("events", "Events", "", [], { parts: parts({
      caption: `What happened, the latest first${left > 0 ? `; ${left} earlier ones are left out` : ""}`,
      head: ["step", "kind", "message", "time"], rows: events,
    }) }),
    section("configuration", "Configuration", "", [], { parts: parts({
      caption: "As recorded when the run began", head: ["key", "value"], rows: config,
    }) }),
    section("versions", "Versions", "", [], { parts: parts({
      caption: "Of what made the run", head: ["package", "version"], rows: Object.entries(run.versions),
    }) }),
  ];
}

/** Nested settings as [dotted key, value as text]. */
function flat(value, key = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    return Object.entries(value).flatMap(([name, one]) => flat(one, key ? `${key}.${name}` : name));
  }
  return key ? [[key, typeof value === "string" ? value : JSON.stringify(value)]] : [];
}

/** The headlines of a run. */
function factsOf(run) {
  const last = (name) => {
    const one = series(run, name);
    return one ? one.values[one.values.length - 1] : NaN;
  };
  const facts = [
    ["begun", moment(run.created)], ["measurements", short(run.measurements)],
    ["last step", run.last_step === null ? "–" : short(run.last_step)],
  ];
  const numbersShown = [
    ["loss", last("train/loss")], ["λmax", last("curv/hessian/lambda_max")], ["tr H", last("curv/hessian/trace")],
    ["noise scale", last("noise/scale")], ["γ", last("align/gamma")],
  ];
  const finiteOnes = numbersShown.filter((one) => Number.isFinite(one[1]));
  const edge = edgeFact(run);
  return [...facts, ...finiteOnes.map(([name, value]) => [name, short(value)]), ...(edge ? [edge] : [])];
}
