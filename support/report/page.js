// The page of report.py: curves, a step, its groups, and each token with the numbers of its update.
// What models and datasets have written is hostile text: it enters the page by textContent alone.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

if (data.kl) for (const words of Object.values(WORDS)) Object.assign(words, words.of_objectives);
const state = { lang: data.lang, run: 0, step: 0, tint: "push", token: null, sides: null };
const t = (key, ...values) => { const word = WORDS[state.lang][key]; return values.length ? word(...values) : word; };

// ------------------------------------------------------------------------------- small helpers

/** An element: properties by name (aria- and data- as attributes), children as elements or text. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|data-|colspan|scope|role|lang)/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
/** The same for a drawing. */
function s(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
/** A number with 4 digits, and a minus that is one. */
function num(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? x.toExponential(2) : String(+x.toPrecision(digits));
  return text.replaceAll("-", MINUS);
}
const signed = (x) => (x > 0 ? "+" : "") + num(x);
const inside = (x) => (x < 0 ? `(${num(x)})` : num(x)); // in a formula
const average = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const scored = (values) => values.filter((x) => x !== null);
function deviation(values) {
  const m = average(values);
  return values.length < 2 ? 0 : Math.sqrt(values.reduce((a, x) => a + (x - m) ** 2, 0) / (values.length - 1));
}
/** Text as it can be seen: what would turn or hide other text is shown by its number. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u00a0\u00ad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]|[\u{e0000}-\u{e007f}]/gu;
const visible = (text) => String(text).replace(HIDDEN, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const named = (text) => `“${visible(text).replaceAll("\n", "⏎").replace(/^ +$/, (x) => "␣".repeat(x.length))}”`;
const advice = (name) => (state.lang === "zh" ? ZH : data).alarms[name];
const run = () => data.runs[state.run];
const row = () => run().steps[state.step];
const place = (key) => {
  const found = data.places[key];
  return found ? h("span", { className: "place", lang: "en" }, `${found[0]}:${found[1]}  ${found[2]}`) : null;
};

// -------------------------------------------------------------------------- the run at a glance

/** The first and the last step of each time that an alarm was on; pauses of a step do not end it. */
function alarmsOf(metrics) {
  const found = [];
  for (const name of Object.keys(data.alarms)) {
    let now = null;
    for (const each of metrics) {
      if (!each[`alarm/${name}`]) continue;
      if (now && each.step - now.last <= 20) now.last = each.step;
      else found.push(now = { name, first: each.step, last: each.step });
    }
  }
  return found.sort((a, b) => a.first - b.first);
}
function glance() {
  const lines = [], alarms = [];
  data.runs.forEach((each) => {
    const prefix = data.runs.length > 1 ? `${each.name}: ` : "";
    const evaluated = each.metrics.filter((m) => "eval/accuracy" in m);
    if (evaluated.length > 1) {
      const a = evaluated[0], b = evaluated.at(-1), text = (m) => `${num(m["eval/accuracy"], 3)} (${num(m["eval/accuracy_low"], 3)}–${num(m["eval/accuracy_high"], 3)})`;
      const change = b["eval/accuracy_low"] > a["eval/accuracy_high"] ? "rose" : b["eval/accuracy_high"] < a["eval/accuracy_low"] ? "fell" : "unclear";
      lines.push(`${prefix}${t("ev_acc", text(a), text(b))}: ${t(change)}`);
    }
    const places = { outside: [], inside: [] };
    for (const chart of data.charts.filter((c) => c.band)) {
      const x = each.metrics.findLast((m) => Number.isFinite(m[chart.name]))?.[chart.name];
      if (x === undefined) continue;
      const good = x >= chart.band[0] && x <= chart.band[1];
      const first = each.metrics.find((m) => Number.isFinite(m[chart.name]) && (m[chart.name] < chart.band[0] || m[chart.name] > chart.band[1]));
      places[good ? "inside" : "outside"].push(`${t("charts")[chart.name]} ${num(x, 3)} (${num(chart.band[0])}–${num(chart.band[1])}${first ? t("since", first.step) : ""})`);
    }
    for (const [where, found] of Object.entries(places)) if (found.length) lines.push(`${prefix}${t(where)}: ${found.join("; ")}`);
    const found = alarmsOf(each.metrics);
    lines.push(prefix + (found.length ? `${t("alarms_some", found.length)}. ${t("later")}` : t("alarms_none")));
    for (const one of found) alarms.push(h("p", { className: "alarm" }, h("b", {}, `▲ ${prefix}${one.name}, ${t("alarm_steps", one.first, one.last)}: `), h("span", {}, advice(one.name))));
    if (each.note) lines.push(prefix + each.note);
  });
  $("verdict").replaceChildren(...lines.map((line) => h("li", {}, line)));
  $("alarms").replaceChildren(...alarms);
  $("charts").replaceChildren(...data.charts.map(figure).filter(Boolean));
  $("intro").replaceChildren(h("summary", {}, t("intro")), ...t("intro_text").map((text) => h("p", {}, text)));
}
const W = 300, H = 110, LEFT = 42, BOTTOM = 14;
/** One metric over the steps, of each run: band, interval, line, alarms; or null without values. */
function figure(chart) {
  const series = data.runs.map((each) => each.metrics.filter((m) => Number.isFinite(m[chart.name])));
  const every = series.flat();
  if (!every.length) return null;
  const last = Math.max(1, ...data.runs.flatMap((each) => each.metrics.map((m) => m.step)));
  const values = every.flatMap((m) => [m[chart.name], m[chart.low] ?? m[chart.name], m[chart.high] ?? m[chart.name]]);
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.band) { low = Math.min(low, chart.band[0]); high = Math.max(high, Math.min(chart.band[1], 2 * high - low)); }
  if (low === high) { high += 1; }
  const x = (step) => LEFT + (W - LEFT - 6) * step / last, y = (v) => 8 + (H - BOTTOM - 8) * (high - v) / (high - low);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" });
  if (chart.band) {
    const top = y(Math.min(high, chart.band[1])), bottom = y(Math.max(low, chart.band[0]));
    svg.append(s("rect", { class: "band", x: LEFT, y: top, width: W - LEFT - 6, height: Math.max(0, bottom - top) }));
  }
  svg.append(s("line", { class: "axis", x1: LEFT, x2: W - 6, y1: H - BOTTOM, y2: H - BOTTOM }));
  for (const [value, at] of [[high, 12], [low, H - BOTTOM - 2]]) svg.append(s("text", { x: LEFT - 4, y: at, "text-anchor": "end" }, num(value, 3)));
  for (const step of [0, last]) svg.append(s("text", { x: x(step), y: H - 3, "text-anchor": step ? "end" : "start" }, String(step)));
  series.forEach((rows, r) => {
    if (chart.low && rows.length) {
      const up = rows.map((m) => `${x(m.step)},${y(m[chart.high] ?? m[chart.name])}`), back = rows.map((m) => `${x(m.step)},${y(m[chart.low] ?? m[chart.name])}`).reverse();
      svg.append(s("polygon", { class: `interval run${r}`, points: [...up, ...back].join(" ") }));
    }
    svg.append(s("polyline", { class: `run${r}`, points: rows.map((m) => `${x(m.step)},${y(m[chart.name])}`).join(" ") }));
    if (rows.length < 30) for (const m of rows) svg.append(s("circle", { class: `dot run${r}`, cx: x(m.step), cy: y(m[chart.name]), r: 2 }));
    for (const one of alarmsOf(data.runs[r].metrics)) if (chart.alarms.includes(one.name)) {
      svg.append(s("path", { class: "mark", d: `M${x(one.first) - 5},0 h10 l-5,9 z` }, s("title", {}, `${one.name}: ${advice(one.name)}`)));
    }
  });
  const now = row()?.step;
  if (now !== undefined) svg.append(s("line", { class: "now", x1: x(now), x2: x(now), y1: 4, y2: H - BOTTOM }));
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), step = last * ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - 6);
    const steps = run().steps.map((each) => each.step);
    if (steps.length) goTo(steps.indexOf(steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a))));
  });
  const said = series.map((rows, r) => {
    if (!rows.length) return null;
    const here = rows.findLast((m) => m.step <= (now ?? last)) ?? rows[0];
    const words = `${num(rows[0][chart.name], 3)} → ${num(rows.at(-1)[chart.name], 3)}; ${t("at", here.step)}: ${num(here[chart.name], 3)}`;
    return h("div", {}, data.runs.length > 1 ? h("span", { className: r ? "key second" : "key" }, `${data.runs[r].name}: `) : null, words);
  });
  const band = chart.band ? h("div", {}, `${t("healthy")}: ${num(chart.band[0])}–${num(chart.band[1])}`) : null;
  const about = h("details", {}, h("summary", {}, t("what")), h("span", {}, `${chart.name}: ${(state.lang === "zh" ? ZH : data).meanings[chart.name]}`));
  return h("figure", { "data-chart": chart.name }, svg, h("figcaption", {}, h("b", {}, t("charts")[chart.name]), said, band, about));
}

// ------------------------------------------------------------------------- what a token was told

/** The gradient of the loss at log π of a token; where it was not kept, that of the policy term. */
const gradient = (u, i) => (u.gradient ? u.gradient[i] : u.weight * u.policy_gradient[i]);
const push = (u, i) => -(gradient(u, i) ?? NaN) || 0;
const TINTS = {
  push,
  logit: (u, i) => push(u, i) * (1 - Math.exp(u.log_probs[i])) / temperature(),
  log: (u, i) => -u.log_probs[i],
  ratio: (u, i) => (u.old ? u.log_probs[i] - u.old[i] : 0),
  kl: (u, i) => u.kl?.[i] ?? 0,
  entropy: (u, i) => u.entropies[i],
};
const SIGNED = ["push", "logit", "ratio"]; // of these the sign is a colour
/** Whether there is anything to colour by: a KL, a policy that is not the one that sampled. */
const hasTint = (name) => !["kl", "ratio"].includes(name) || run().steps.some((each) => each.completions.some((c) => c.updates?.some((u) => u[name === "kl" ? "kl" : "old"])));
const temperature = () => Number(run().settings.temperature ?? 1);
const updateOf = (c) => c.updates?.[c.chosen ?? 0];
/** Every token of the step by the number that colours it, the largest first. */
function ordered() {
  const all = [];
  row().completions.forEach((c, k) => {
    const u = updateOf(c);
    if (u) u.log_probs.forEach((_, i) => all.push({ k, i, value: TINTS[state.tint](u, i) }));
  });
  return all.sort((a, b) => b.value - a.value);
}
/** The strongest token of each of the three completions that have the strongest ones. */
function strongest(order) {
  const found = [];
  for (const each of order) if (found.length < 3 && !found.some((other) => other.k === each.k)) found.push({ ...each, alike: order.filter((x) => x.k === each.k && Math.abs(x.value - each.value) < 1e-3 * Math.abs(each.value)).length });
  return found;
}
/** Each number of a token as a line: what it is, the equation with the numbers in it, where it is computed. */
function explain(c, u, i) {
  const o = row().objective, paper = row().paper, group = row().groups.find((g) => g.group === c.group);
  const A = group.advantages[c.index], now = u.log_probs[i], lines = [];
  const add = (name, formula, key, ...notes) => lines.push(h("dt", {}, name), h("dd", {}, h("span", { className: "formula" }, formula), notes.filter(Boolean).map((note) => h("div", { className: "note" }, note)), place(key)));
  add(t("prob"), `log π = ${num(now)},  π = ${num(Math.exp(now))}`, "log_prob");
  const old = u.old ? u.old[i] : now;
  add(t("old"), `log π_old = ${num(old)},  π_old = ${num(Math.exp(old))}`, "old", u.old ? null : t("same_old"));
  let level = now - old;
  const whole = o.ratio_level !== "token";
  if (whole && u.old) level = average(u.log_probs.map((x, k) => x - u.old[k]));
  const r = Math.exp(Math.max(-20, Math.min(20, level)));
  add(t(whole ? "ratio_seq" : "ratio"), whole ? `r = exp(mean(log π ${MINUS} log π_old)) = ${num(r)}` : `r = π / π_old = exp(${num(now)} ${MINUS} ${inside(old)}) = ${num(r)}`, paper ? "ratio" : whole ? "sequence_ratio" : "ratio");
  add(t("adv"), advantageFormula(o, group, c.index, A), paper ? "advantage" : "other_advantage");
  const low = o.clip_eps, high = o.clip_eps_high ?? o.clip_eps, slope = u.policy_gradient[i];
  const dual = A < 0 ? o.clip_ratio_c : null; // of a bad completion alone
  if (o.surrogate === "clip" && u.policy_gradient) {
    const cut = Math.min(1 + high, Math.max(1 - low, r));
    const term = -Math.min(r * A, cut * A), most = dual ? -dual * A : null;
    const formula = `${MINUS}min(r A, clip(r, 1${MINUS}${num(low)}, 1+${num(high)}) A)`, numbers = `${MINUS}min(${num(r * A)}, ${num(cut * A)})`;
    add(t("policy"), dual ? `min(${formula}, ${MINUS}${num(dual)} A) = min(${numbers}, ${num(most)}) = ${num(Math.min(term, most))}` : `${formula} = ${numbers} = ${num(term)}`, paper ? "policy" : "surrogate:clip");
  } else add(t("policy"), data.surrogates[o.surrogate] ?? o.surrogate, `surrogate:${o.surrogate}`);
  const isClipped = u.clipped.includes(i), isMasked = u.masked.includes(i);
  let why = null;
  if (isMasked) why = t("masked");
  else if (isClipped) why = o.surrogate !== "clip" ? t("no_slope") : A > 0 && r > 1 + high ? t("clip_high", num(high)) : A < 0 && r < 1 - low ? t("clip_low", num(low)) : dual && r > dual ? t("clip_dual", num(dual)) : t("no_slope");
  else if (o.surrogate === "clip" && !o.clip_ratio_c && ((A < 0 && r > 1 + high) || (A > 0 && r < 1 - low))) why = t("against");
  const simple = o.surrogate === "clip" && Math.abs(slope + r * A) <= 1e-4 * Math.abs(slope) && !whole;
  add(t("slope"), simple && slope !== 0 ? `${MINUS}r A = ${MINUS}${num(r)} × ${inside(A)} = ${num(slope)}` : num(slope), !isClipped || dual && r > dual ? null : A < 0 && o.surrogate === "clip" && r < 1 ? "clipped_low" : "clipped", why, u.sampler && o.sampler_correction !== "none" ? t("corrected") : null);
  let klSlope = null;
  if (u.kl) {
    const ref = u.reference?.[i];
    if (u.gradient && o.kl_estimator !== "full") klSlope = (u.gradient[i] / u.weight - slope) / o.kl_weight;
    if (o.kl_estimator === "k3" && ref !== undefined) {
      const far = u.kl[i] >= 10, value = Math.exp(ref - now) - (ref - now) - 1; // loss.py's KL_LIMIT
      klSlope = far ? 0 : 1 - Math.exp(ref - now);
      add(t("kl"), `k3 = π_ref/π ${MINUS} log(π_ref/π) ${MINUS} 1 = ${num(Math.exp(ref - now))} ${MINUS} ${inside(ref - now)} ${MINUS} 1 = ${num(far ? value : u.kl[i])}`, "kl", `log π_ref = ${num(ref)}${far ? "" : `;  ${t("kl_slope")}: 1 ${MINUS} π_ref/π = ${num(klSlope)}`}`, far ? t("kl_limit") : null);
    } else if (o.kl_estimator === "full") add(t("kl"), num(u.kl[i]), null, t("whole_kl"));
    else add(t("kl"), `${o.kl_estimator} = ${num(u.kl[i])}`, "other_kl", ref === undefined ? null : `log π_ref = ${num(ref)}`);
  }
  const length = u.log_probs.length, count = 1 / (u.weight * length);
  const mean = o.loss_agg_mode === "seq-mean-token-mean" && Math.abs(count - Math.round(count)) < 1e-3;
  add(t("weight"), `w = ${mean ? `${t("weight_mean", Math.round(count), length)} = ` : ""}${num(u.weight)}`, paper ? "weight" : "other_weight");
  const p = push(u, i), sum = klSlope === null ? inside(slope) : `(${num(slope)} + ${num(o.kl_weight)} × ${inside(klSlope)})`;
  add(t("push"), `${MINUS}w × ${sum} = ${signed(p)}`, "gradient", u.gradient ? t("exact") : null);
  lines.unshift(...lines.splice(-2)); // what a reader came for, first
  const q = Math.exp(now), heat = temperature();
  add(t("logit"), `${signed(p)} × (1 ${MINUS} ${num(q)})${heat === 1 ? "" : ` / ${num(heat)}`} = ${signed(TINTS.logit(u, i))}`, null, t("logit_why"));
  add(t("entropy"), `${num(u.entropies[i])} ${t("nats")}`, "entropy", o.entropy_weight > 0 ? t("whole_entropy") : null);
  if (u.sampler) add(t("sampler"), num(u.sampler[i]), null);
  return lines;
}
/** The advantage with its numbers, where it is the group's comparison alone; else its value. */
function advantageFormula(o, group, index, A) {
  const R = scored(group.returns), own = group.returns[index];
  const other = o.advantage !== "group" || o.whiten_advantages || o.relative_reward_weight !== 1 || o.baseline_reward_weight || o.multi_objective_aggregation !== "sum_then_normalize";
  if (own === null || group.all !== group.returns.length) return `A = ${num(A)}`;
  const m = average(R), sd = deviation(R), full = (own - m) / (sd + 1e-4), centred = own - m;
  if (!other && o.advantage_std === "group" && Math.abs(full - A) < 1e-3) return `A = (R ${MINUS} mean) / (std + 0.0001) = (${num(own)} ${MINUS} ${inside(m)}) / (${num(sd)} + 0.0001) = ${num(A)}`;
  if (!other && o.advantage_std === "none" && Math.abs(centred - A) < 1e-3) return `A = R ${MINUS} mean = ${num(own)} ${MINUS} ${inside(m)} = ${num(A)}`;
  return `A = ${num(A)}  (R = ${num(own)})`;
}
function showToken(k, i, focus = false) {
  state.token = { k, i };
  const c = row().completions[k], u = updateOf(c);
  for (const old of document.querySelectorAll(".tok[aria-pressed=true]")) old.setAttribute("aria-pressed", "false");
  const element = document.querySelector(`.tok[data-k="${k}"][data-i="${i}"]`);
  if (element) {
    for (const other of element.parentElement.querySelectorAll(".tok[tabindex='0']")) other.tabIndex = -1;
    element.tabIndex = 0;
    element.setAttribute("aria-pressed", "true");
    if (focus) element.focus();
    if (focus || matchMedia("(max-width: 52rem)").matches) element.scrollIntoView({ block: "nearest" });
  }
  const p = push(u, i), verdict = p > 0 ? "likelier" : p < 0 ? "unlikelier" : "still";
  $("token").classList.remove("empty");
  $("detail").replaceChildren(
    h("p", { className: "text big" }, named(c.tokens[i]), " ", h("span", { className: "note" }, t("token_of", i + 1, c.tokens.length))),
    h("p", { className: p > 0 ? "goes-up" : p < 0 ? "goes-down" : "" }, !u.clipped.includes(i) ? t(verdict) : p ? t("clipped_kl", p > 0) : t("clipped_still")),
    h("dl", {}, explain(c, u, i)));
}
function noToken() {
  state.token = null;
  state.pinned = false;
  for (const old of document.querySelectorAll(".tok[aria-pressed=true]")) old.setAttribute("aria-pressed", "false");
  $("token").classList.add("empty");
  $("detail").replaceChildren(h("p", { className: "note" }, t("choose")));
}

// ------------------------------------------------------------------------------------- one step

function showStep() {
  const here = run(), steps = here.steps;
  $("controls").hidden = !steps.length;
  noToken();
  $("token").hidden = !steps.length;
  for (const id of ["groups", "strongest", "legend", "hits"]) $(id).replaceChildren();
  if (!steps.length) { $("step-note").textContent = t("no_recording"); return; }
  $("slider").max = steps.length - 1;
  $("slider").value = state.step;
  const now = row();
  $("slider").setAttribute("aria-valuetext", now.name ?? `${t("step")} ${now.step}`);
  $("step-name").textContent = now.name ? `${now.name} (${now.step} / ${steps.length})` : `${now.step} / ${steps.at(-1).step}`;
  $("step-note").textContent = [now.name ? t("differs", now.differs) : "", now.name ? "" : sizes(), now.every > 1 ? t("thinned", now.every) : "", now.groups.length < now.all ? t("shown_of", now.groups.length, now.all) : "", !now.name && state.tint === "push" && now.completions.every((c) => !updateOf(c) || samePush(updateOf(c))) ? t("same_push") : ""].join(" ").trim();
  const order = ordered(), largest = Math.max(1e-30, ...order.map((each) => Math.abs(each.value))), bySign = SIGNED.includes(state.tint);
  if (order.length) $("legend").replaceChildren(h("span", {}, bySign ? state.tint === "ratio" ? t("legend_ratio", factor(order.at(-1).value), factor(order[0].value)) : t("legend", num(largest)) : t("legend_other", num(order.at(-1).value), num(order[0].value))));
  if (order.length && bySign) {
    const ends = [...strongest(order.filter((x) => x.value >= 0.01 * largest)), ...strongest(order.filter((x) => x.value <= -0.01 * largest).reverse())];
    const sampled = now.groups.reduce((sum, g) => sum + g.all, 0);
    if (ends.length) $("strongest").replaceChildren(h("span", {}, t("strongest", now.completions.length, sampled), " "), ...ends.map(({ k, i, value, alike }) => h("button", { type: "button", onclick: () => { showToken(k, i, true); } }, `${value > 0 ? "▲" : "▼"} ${named(now.completions[k].tokens[i])} ${state.tint === "ratio" ? factor(value) : signed(value)}${alike > 1 ? t("alike", alike - 1) : ""}${t("of_question", now.completions[k].group + 1)}`)));
  }
  const clips = now.completions.flatMap((c, k) => (c.updates ?? []).map((u, n) => ({ c, k, u, n }))).filter(({ u }) => u.clipped.length);
  if (now.completions.some((c) => (c.updates ?? []).some((u) => u.old))) {
    const buttons = clips.slice(0, 6).map(({ c, k, u, n }) => h("button", { type: "button", onclick: () => { c.chosen = n; showStep(); showToken(k, u.clipped[0], true); } }, t("clip_at", named(c.tokens[u.clipped[0]]), u.clipped.length, u.update, c.group + 1)));
    $("strongest").append(h("div", {}, h("span", {}, t("clips"), " "), ...(buttons.length ? buttons : [h("span", { className: "note" }, t("no_clips"))])));
  }
  const withTokens = now.groups.filter((g) => now.completions.some((c) => c.group === g.group)), rest = now.groups.filter((g) => !withTokens.includes(g));
  withTokens.sort((a, b) => now.completions.findIndex((c) => c.group === a.group) - now.completions.findIndex((c) => c.group === b.group));
  const parts = withTokens.map((g) => groupOf(g, largest));
  if (rest.length) parts.push(h("details", {}, h("summary", {}, t("more_groups", rest.length)), rest.map((g) => groupOf(g, largest))));
  $("groups").replaceChildren(...parts);
}
/** A change of a probability, of its logarithm: ×2.5, ÷4. */
const factor = (x) => (x < 0 ? `÷${num(Math.exp(-x))}` : `×${num(Math.exp(x))}`);
/** What a step of this run consists of. */
function sizes() {
  const o = run().settings, all = o.rollouts_per_step * o.group_size, each = Math.min(o.train_batch_size, all);
  return each > 0 ? t("sizes", o.rollouts_per_step, o.group_size, Math.ceil(all / each) * (o.epochs_per_step ?? 1), each) : "";
}
/** Whether all tokens of a completion are pushed alike. */
function samePush(u) {
  const all = u.log_probs.map((_, i) => push(u, i)), high = Math.max(...all), low = Math.min(...all);
  return all.length > 1 && high !== 0 && high - low <= 1e-2 * Math.max(high, -low);
}
function groupOf(group, largest) {
  const now = row(), R = scored(group.returns), own = now.completions.map((c, k) => ({ c, k })).filter(({ c }) => c.group === group.group);
  const idle = group.advantages.every((a) => a === 0), seen = (i) => (own.some(({ c }) => c.index === i) ? "seen" : "");
  const line = (name, values, form) => h("tr", {}, h("th", { scope: "row" }, name), values.map((v, i) => h("td", { className: seen(i) }, form(v))));
  const rows = [line(t("completion"), group.returns.map((_, i) => i + 1), String)];
  for (const [name, values] of Object.entries(group.rewards ?? {})) rows.push(line(visible(name), values, (v) => num(v, 3)));
  rows.push(line(t("rewards"), group.returns, (v) => num(v, 3)), line(t("advantage"), group.advantages, (v) => num(v, 3)), line(t("length"), group.lengths, String));
  return h("article", { className: "group" },
    h("h3", {}, t("group", group.group + 1)),
    h("div", { className: "text", dir: "auto" }, visible(group.question)),
    h("div", { className: "note text" }, `${t("reference")}: ${visible(group.reference)} · ${t("rewards")}: ${t("mean")} ${num(R.length ? average(R) : null, 3)}, ${t("std")} ${num(deviation(R), 3)}`),
    idle ? h("p", {}, "⚠ ", t(R.length > 1 && Math.max(...R) === Math.min(...R) ? "idle" : "idle_other"), now.objective.kl_weight > 0 && !now.objective.kl_in_reward ? t("idle_kl") : "", state.lang === "zh" ? "。" : ".") : null,
    h("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": t("rewards") }, h("table", {}, h("tbody", {}, rows))),
    group.all > group.returns.length ? h("p", { className: "note" }, t("more", group.all - group.returns.length)) : null,
    own.map(({ c, k }) => completionOf(group, c, k, largest)));
}
function completionOf(group, c, k, largest) {
  const u = updateOf(c), facts = [`${t("completion")} ${c.index + 1}`, `${t("rewards")} ${num(group.returns[c.index], 3)}`, `${t("advantage")} ${signed(group.advantages[c.index])}`, t(c.right ? "right" : "wrong")];
  if (c.truncated) facts.push(t("cut"));
  if (c.copies > 1) facts.push(t("copies", c.copies));
  const buttons = (c.updates ?? []).length > 1 ? h("div", { className: "note" }, `${t("updates")}: `, c.updates.map((each, n) => h("button", { type: "button", "aria-pressed": String(n === (c.chosen ?? 0)), onclick: () => { c.chosen = n; const kept = state.token; showStep(); if (kept) showToken(kept.k, kept.i); } }, t("update", each.update)))) : u ? h("span", { className: "note" }, `${t("updates")}: ${t("update", u.update)}`) : null;
  const tokens = h("div", { className: "tokens", role: "group", dir: "auto", "aria-label": facts.join(", ") }, c.opened ? h("span", { className: "opened" }, visible(c.opened)) : null, c.tokens.map((text, i) => tokenOf(c, u, k, i, text, largest)));
  tokens.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { // to the numbers; Escape comes back
      event.preventDefault();
      $("token").focus();
      return;
    }
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key], at = event.target.dataset?.i;
    if (!step || at === undefined) return;
    event.preventDefault();
    showToken(k, Math.max(0, Math.min(c.tokens.length - 1, Number(at) + step)), true);
  });
  return h("section", { className: "completion" }, h("b", {}, facts.join(" · ")), " ", buttons, tokens, u ? null : h("p", { className: "note" }, t(whyNot(group, c))));
}
/** Why a completion was not trained, as far as the page can know. */
function whyNot(group, c) {
  const o = row().objective, other = (o.kl_weight > 0 && !o.kl_in_reward) || o.entropy_weight || (o.entropy_target ?? null) !== null || (c.truncated && o.mask_truncated);
  return group.advantages[c.index] === 0 && !other ? "untrained_zero" : "untrained";
}
function tokenOf(c, u, k, i, text, largest) {
  const shown = visible(text).replaceAll("\n", "⏎\n") || (u ? "·" : "");
  if (!u) return h("span", {}, shown);
  const p = push(u, i), value = TINTS[state.tint](u, i), by = SIGNED.includes(state.tint);
  const element = h("span", { className: "tok", role: "button", tabIndex: i ? -1 : 0, "aria-pressed": "false", "data-k": k, "data-i": i, "aria-label": `${named(text)}, ${t(p > 0 ? "up" : p < 0 ? "down" : "not")} ${num(Math.abs(p))}${u.clipped.includes(i) ? `, ${t("clipped")}` : ""}` }, shown);
  element.classList.toggle("up", p > 0);
  element.classList.toggle("down", p < 0);
  element.classList.toggle("clipped", u.clipped.includes(i));
  const colour = !by ? "--other" : value > 0 ? "--up" : "--down", strength = Math.min(1, Math.abs(value) / largest);
  if (value) element.style.backgroundColor = `rgb(var(${colour}) / ${(0.06 + 0.5 * strength).toFixed(3)})`;
  element.addEventListener("focus", () => { if (state.token?.k !== k || state.token?.i !== i) showToken(k, i); });
  element.addEventListener("click", () => { showToken(k, i); state.pinned = true; });
  return element;
}
function goTo(step) {
  state.step = Math.max(0, Math.min(run().steps.length - 1, step));
  showStep();
  $("charts").replaceChildren(...data.charts.map(figure).filter(Boolean));
  if (data.kl) showRow();
}
function search() {
  const wanted = $("search").value.trim().toLowerCase(), hits = [];
  if (!wanted) { $("hits").replaceChildren(); return; }
  run().steps.forEach((each, step) => {
    const look = (text, what) => {
      const at = text.toLowerCase().indexOf(wanted);
      if (at >= 0) hits.push({ step, what: `${t("step")} ${each.step}, ${what}: …${visible(text.slice(Math.max(0, at - 30), at + 60)).replaceAll("\n", "⏎")}…` });
    };
    for (const group of each.groups) look(group.question, t("in_question"));
    for (const c of each.completions) look(c.tokens.join(""), t("completion"));
  });
  $("hits").replaceChildren(h("p", { className: "note" }, t("hits", hits.length)), ...hits.slice(0, 30).map((hit) => h("button", { type: "button", onclick: () => { goTo(hit.step); $("hits").replaceChildren(); } }, hit.what)));
}

// ----------------------------------------------------------------------- before and after

function showAnswers() {
  const all = data.runs.flatMap((each, r) => each.answers.map((row) => ({ r, row, name: `${data.runs.length > 1 ? `${each.name}, ` : ""}${t("step")} ${row.step}` })));
  if (!all.length) { $("answers").replaceChildren(h("p", { className: "note" }, t("no_answers"))); return; }
  const questions = [...new Set(all.flatMap(({ row }) => row.answers.map((a) => a.question)))];
  const lastOf = (r) => all.findLastIndex((each) => each.r === r);
  const both = data.runs.length > 1 && lastOf(0) >= 0 && lastOf(1) >= 0;
  const changed = questions.findIndex((q) => new Set(all.flatMap(({ row }) => row.answers.filter((a) => a.question === q).map((a) => a.right))).size > 1);
  state.sides ??= { question: Math.max(0, changed), left: both ? lastOf(0) : 0, right: all.length - 1 };
  const select = (name, options) => {
    const element = h("select", { "aria-label": name === "question" ? t("question") : t("step"), onchange: () => { state.sides[name] = Number(element.value); showAnswers(); } }, options.map((text, i) => h("option", { value: i, selected: i === state.sides[name] }, text)));
    return element;
  };
  const side = (name) => {
    const found = all[state.sides[name]].row.answers.find((a) => a.question === questions[state.sides.question]);
    const facts = found ? [`${found.right ? "✓" : "✗"} ${t(found.right ? "right" : "wrong")}`, `${t("length")} ${found.length}`, ...(found.truncated ? [t("cut")] : [])].join(" · ") : "–";
    return h("div", {}, select(name, all.map((each) => each.name)), h("p", {}, h("b", {}, facts)), h("div", { className: "text", dir: "auto" }, found ? visible(found.text) : ""));
  };
  const asked = all.flatMap(({ row }) => row.answers).find((a) => a.question === questions[state.sides.question]);
  $("answers").replaceChildren(h("label", {}, `${t("question")} `, select("question", questions.map((_, i) => String(i + 1)))),
    h("p", { className: "text", dir: "auto" }, visible(asked.question)), h("p", { className: "note text" }, `${t("reference")}: ${visible(asked.reference)}`), h("div", { className: "pair" }, side("left"), side("right")));
}
function showSettings() {
  const names = [...new Set(data.runs.flatMap((each) => Object.keys(each.settings)))];
  $("settings").replaceChildren(h("details", {}, h("summary", {}, t("show")), h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, t("setting")), data.runs.map((each) => h("th", {}, each.name)))), h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name), data.runs.map((each) => h("td", {}, visible(JSON.stringify(each.settings[name] ?? each.steps[0]?.objective[name]) ?? "–")))))))));
}

// ------------------------------------------------------------- one rollout under all objectives

/** The map, one row for each objective; and the KL estimators. */
function showObjectives() {
  for (const id of ["glance-part", "answers-part", "settings-part"]) $(id).hidden = true;
  for (const id of ["map-part", "kl-part"]) $(id).hidden = false;
  const steps = run().steps, left = 200, high = 34, bar = 3, places = [];
  let x = left;
  steps[0].completions.forEach((c, k) => {
    x += k && c.group !== steps[0].completions[k - 1].group ? 18 : 6;
    places.push(x);
    x += bar * c.tokens.length;
  });
  const svg = s("svg", { viewBox: `0 0 ${x + 4} ${high * steps.length}`, width: x + 4, "aria-hidden": "true" }, s("rect", { class: "band", x: 0, width: x + 4, height: high }));
  steps.forEach((each, row) => {
    const middle = high * row + high / 2, pushes = each.completions.map((c) => (c.updates ? c.updates[0].log_probs.map((_, i) => push(c.updates[0], i)) : []));
    const largest = Math.max(1e-30, ...pushes.flat().map(Math.abs));
    svg.append(s("text", { class: "name", x: 4, y: middle + 4 }, each.name));
    each.completions.forEach((c, k) => {
      if (c.updates) svg.append(s("line", { class: "axis", x1: places[k], x2: places[k] + bar * c.tokens.length, y1: middle, y2: middle }));
      pushes[k].forEach((p, i) => {
        const size = Math.abs(p) / largest * (high / 2 - 2), at = { x: places[k] + bar * i, width: bar - 0.5 };
        const mark = c.updates[0].clipped.includes(i) ? s("circle", { class: "clip", cx: at.x + bar / 2, cy: middle, r: 2 }) : s("rect", { class: p > 0 ? "up" : "down", y: p > 0 ? middle - size : middle, height: size, ...at });
        mark.append(s("title", {}, `${each.name}: ${named(c.tokens[i])} ${signed(p)}`));
        mark.addEventListener("click", (event) => { event.stopPropagation(); goTo(row); showToken(k, i, true); });
        svg.append(mark);
      });
    });
    const whole = s("rect", { class: "hit", x: 0, y: middle - high / 2, width: left, height: high });
    whole.addEventListener("click", () => goTo(row));
    svg.append(whole);
  });
  $("map").replaceChildren(svg);
  showRow();
  $("kl").replaceChildren(curves("values", t("kl_value")), curves("gradient", t("kl_gradient")), data.kl.beyond ? h("p", { className: "note" }, t("kl_beyond", data.kl.beyond)) : "");
}
/** Mark the row of the objective that is shown. */
function showRow() {
  const band = $("map").querySelector(".band");
  band.setAttribute("y", state.step * band.getAttribute("height"));
}
/** The four estimators over d = log π - log π_ref. */
function curves(kind, title) {
  const { d, tokens } = data.kl, names = Object.keys(data.kl.curves), top = kind === "values" ? 4 : 2, bottom = kind === "values" ? -2 : -4;
  const x = (v) => 34 + (v - d[0]) / (d.at(-1) - d[0]) * 360, y = (v) => 10 + (top - v) / (top - bottom) * 200;
  const svg = s("svg", { viewBox: "0 0 410 240", "aria-hidden": "true" });
  for (const v of [bottom, 0, top]) svg.append(s("line", { class: "axis", x1: 34, x2: 394, y1: y(v), y2: y(v) }), s("text", { x: 30, y: y(v) + 3, "text-anchor": "end" }, num(v)));
  svg.append(s("line", { class: "axis", x1: x(0), x2: x(0), y1: 10, y2: 210 }));
  for (const v of [d[0], 0, d.at(-1)]) svg.append(s("text", { x: x(v), y: 232, "text-anchor": "middle" }, num(v)));
  names.forEach((name, n) => {
    const seen = d.map((v, i) => [v, data.kl.curves[name][kind][i]]).filter(([, v]) => v <= top && v >= bottom);
    svg.append(s("polyline", { class: `estimator e${n}`, points: seen.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }));
  });
  for (const v of tokens) svg.append(s("line", { class: "now", x1: x(v), x2: x(v), y1: 214, y2: 221 }));
  const legend = names.map((name, n) => h("span", { className: "curve" }, s("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, s("line", { class: `estimator e${n}`, x1: 0, x2: 26, y1: 4, y2: 4 })), ` ${name}`));
  return h("figure", { "data-chart": kind }, svg, h("figcaption", {}, h("b", {}, title), h("div", {}, t("kl_axis")), legend));
}

// --------------------------------------------------------------------------------- all of it

function render() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = `${data.runs.map((each) => each.name).join(", ") || t("title")} · pocket-grpo`;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = t(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  $("language").textContent = t("other");
  $("names").textContent = data.runs.map((each) => each.name).join(" · ");
  $("run-choice").hidden = data.runs.length < 2;
  $("run").replaceChildren(...data.runs.map((each, i) => h("option", { value: i, selected: i === state.run }, each.name)));
  $("tint").replaceChildren(...Object.keys(TINTS).filter(hasTint).map((name) => h("option", { value: name, selected: name === state.tint }, t(`tint_${name}`))));
  glance(); showStep(); showAnswers(); showSettings();
  if (data.kl) showObjectives();
}
$("language").onclick = () => { state.lang = state.lang === "zh" ? "en" : "zh"; render(); };
$("theme").onclick = () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
$("run").onchange = () => { const step = row()?.step ?? 0; state.run = Number($("run").value); const near = run().steps.findIndex((each) => each.step >= step); goTo(near < 0 ? run().steps.length - 1 : near); };
$("slider").oninput = () => goTo(Number($("slider").value));
$("back").onclick = () => goTo(state.step - 1);
$("forward").onclick = () => goTo(state.step + 1);
$("tint").onchange = () => { state.tint = $("tint").value; showStep(); };
$("search").oninput = search;
$("close").onclick = noToken;
// In a notebook the page stands in a frame, where the link would lead to the notebook.
document.querySelector(".skip").onclick = (event) => { event.preventDefault(); $("step-part").focus(); };
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const chosen = $("token").contains(document.activeElement) && document.querySelector(".tok[aria-pressed=true]");
  if (chosen) chosen.focus();
  else noToken();
});
// Pointing at a token. What scrolls under a mouse that rests is not pointed at.
let mouse = "";
document.addEventListener("mousemove", (event) => {
  const before = mouse, token = event.target.closest?.(".tok");
  mouse = `${event.clientX} ${event.clientY}`;
  if (!token || mouse === before || state.pinned) return;
  const k = Number(token.dataset.k), i = Number(token.dataset.i);
  if (state.token?.k !== k || state.token?.i !== i) showToken(k, i);
});
state.step = Math.max(0, run().steps.findIndex((each) => each.completions.some((c) => c.updates)));
render();
})();
