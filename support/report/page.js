// The page of report.py: curves, a step, its groups, and each token with the numbers of its update.
// What models and datasets have written is hostile text: it enters the page by textContent alone.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const MINUS = "\u2212";

// ---------------------------------------------------------------------------- words of the page

const WORDS = {
en: {
  title: "GRPO under the microscope:", skip: "to the steps", theme: "light / dark", other: "中文",
  glance: "The run at a glance", step_head: "One step, down to the token", answers_head: "The same question before and after",
  settings_head: "Settings", run: "Run", step: "Step", back: "step before", forward: "next step", search: "Search", close: "close",
  chart_note: "Shaded: where a healthy run is. A triangle: an alarm begins. The dashed line is the step that is shown below; a click on a chart chooses it.",
  healthy: "healthy", what: "what is it?", at: (s) => `at step ${s}`,
  tint: "Colour", tint_push: "push on log π", tint_logit: "push on the token’s logit", tint_log: "log π", tint_ratio: "ratio", tint_kl: "KL", tint_entropy: "entropy",
  token_head: "A token", choose: "Choose a token: point at it, touch it, or go to it with Tab and the arrow keys (Enter goes to its numbers, Escape comes back).",
  no_recording: "This run has no recording of its completions (it was made with --log_completions 0, or by an older version), so there are only its curves.",
  no_answers: "No held-out answers were recorded: the run was not evaluated, or made without a recording.",
  thinned: (n) => `The recording keeps every ${n}th step, so that the file stays small.`,
  shown_of: (a, b) => `${a} of ${b} groups are listed.`,
  group: (n) => `Question ${n}`, reference: "right answer", rewards: "reward", advantage: "advantage", length: "tokens", completion: "completion", mean: "mean", std: "std",
  idle: "All rewards are equal, so each advantage is 0 and the group teaches nothing" ,
  idle_kl: "; only the KL to the reference acts on it", more_groups: (n) => `${n} more groups of this step`, more: (n) => `… and ${n} more`,
  right: "right", wrong: "not right", cut: "cut off", copies: (n) => `sampled ${n} times alike`, update: (n) => `optimizer step ${n}`, updates: "trained in",
  untrained: "Not trained: no optimizer step used it. Its advantage is 0 and there is no KL, or it was cut off and such completions are left out, or its records went beyond the limit of a step.",
  strongest: "Strongest in this step:", up: "pushed up", down: "pushed down", not: "not pushed", clipped: "clipped", masked: "not trained (policy_mask)",
  clips: "Clipped in this step:", clip_at: (text, n, u) => `${text}${n > 1 ? ` and ${n - 1} more` : ""}, optimizer step ${u}`, no_clips: "none of the tokens that are shown",
  intro: "New to GRPO? How to read this page", intro_text: ["The model answers each question several times: a group of completions. Each gets a reward. Its advantage says how much better its reward is than the mean of its group: positive for the better answers, negative for the worse ones, 0 for all where the rewards are equal.", "Then every token of a better answer is pushed up (made likelier), every token of a worse one down. The push on a token is its weight in the mean (1 / number of tokens) × the advantage × the ratio.", "The ratio is the token’s probability now, divided by that when it was sampled. It is 1 in the first optimizer step after sampling. Later ones clip it: a token that has already moved far in the direction of its push gets none.", "The KL pulls each token back towards the model that the training began with."],
  alike: (n) => `, and ${n} more alike`,
  same_push: "While the ratio is 1, all tokens of a completion have the same push on log π: GRPO does not know which of them made the answer right. How far a token can follow depends on its probability: choose “push on the token’s logit” as the colour.",
  legend: (m) => `green, solid line: made likelier; red, dashed line: made less likely; struck through: clipped. Strongest: ${m}`, legend_other: (a, b) => `darker is more: from ${a} to ${b}`,
  prob: "How likely was the token?", old: "… when it was sampled", same_old: "the same: with one optimizer step for each rollout, the policy that is trained is the one that sampled",
  ratio: "Ratio, new to old", ratio_seq: "Ratio of the whole completion, new to old", adv: "Advantage of the completion", policy: "Policy term (to be minimized)", slope: "Its slope at log π",
  clip_high: (e) => `r is above 1 + ${e} and A is positive: likelier than the clip rewards, so no gradient`, clip_low: (e) => `r is below 1 ${MINUS} ${e} and A is negative: less likely than the clip punishes, so no gradient`, no_slope: "no gradient: this token is clipped or left out",
  whole_kl: "this KL is over the whole vocabulary; its gradient goes to all logits, and is not part of the push on log π", whole_entropy: "the entropy bonus has a gradient too; it goes to all logits, and is not part of the push on log π",
  kl: "KL to the reference", kl_slope: "its slope", weight: "Weight of each token in the loss", weight_mean: (n, t) => `1 / (${n} completions × ${t} tokens)`,
  push: "Push on log π = minus the gradient of the loss", exact: "the gradient as the backward pass gave it", logit: "Push on the token’s own logit", logit_why: "near 0 where π is near 1: such a token has nowhere to go",
  entropy: "Entropy of the distribution", nats: "nats", sampler: "The sampler’s log π", token_of: (i, n) => `token ${i} of ${n}`,
  likelier: "Pushed up: this update makes the token likelier.", unlikelier: "Pushed down: this update makes the token less likely.", still: "Not pushed: this update does nothing at this token.",
  question: "Question", hits: (n) => `${n} found`, in_question: "question",
  ev_acc: (a, b) => `Held-out accuracy: ${a} → ${b}`, rose: "risen by more than its 95 % intervals", fell: "fallen by more than its 95 % intervals", unclear: "the intervals overlap: no difference that can be told from chance",
  alarms_none: "No alarm has sounded.", alarms_some: (n) => `Alarms that have sounded: ${n}`, alarm_steps: (a, b) => a === b ? `at step ${a}` : `steps ${a} to ${b}`,
  inside: "Within the healthy band at the end", outside: "OUTSIDE the healthy band at the end", setting: "option", value: "value",
  charts: { "eval/accuracy": "held-out accuracy, greedy, 95 % interval", "rollout/returns": "reward of the samples", "rollout/success_rate": "share of right samples", "rollout/completion_tokens": "tokens in a completion", "train/kl_divergence": "KL to the reference, nats", "train/clipped_share": "share of clipped tokens", "rollout/no_spread_share": "share of groups without spread", "train/ratio_mean": "mean ratio, new to old", "train/entropy": "entropy, nats", "train/grad_norm": "gradient norm" },
},
zh: {
  title: "显微镜下的 GRPO：", skip: "跳到训练步", theme: "浅色 / 深色", other: "English",
  glance: "训练概览", step_head: "一个训练步，细到每个词元", answers_head: "同一道题：训练前与训练后",
  settings_head: "设置", run: "训练", step: "步", back: "上一步", forward: "下一步", search: "搜索", close: "关闭",
  chart_note: "阴影：健康的范围。三角：警报开始。虚线是下面显示的那一步；点击曲线可以选择。",
  healthy: "健康范围", what: "这是什么？", at: (s) => `第 ${s} 步`,
  tint: "颜色", tint_push: "对 log π 的推力", tint_logit: "对该词元 logit 的推力", tint_log: "log π", tint_ratio: "比率", tint_kl: "KL", tint_entropy: "熵",
  token_head: "词元", choose: "请选择一个词元：用鼠标指向、触摸，或用 Tab 键和方向键（Enter 进入它的数字，Escape 返回）。",
  no_recording: "这次训练没有保存回答的记录（--log_completions 0，或旧版本），因此只有曲线。",
  no_answers: "没有保存测试题的回答：没有做过评测，或没有记录。",
  thinned: (n) => `为了限制文件大小，记录每 ${n} 步保留一步。`,
  shown_of: (a, b) => `共 ${b} 组，这里列出 ${a} 组。`,
  group: (n) => `问题 ${n}`, reference: "正确答案", rewards: "奖励", advantage: "优势", length: "词元数", completion: "回答", mean: "均值", std: "标准差",
  idle: "奖励全部相同，优势都为 0，这一组什么也教不了", idle_kl: "；只有与参考模型的 KL 起作用", more_groups: (n) => `这一步的其余 ${n} 组`, more: (n) => `……还有 ${n} 个`,
  right: "正确", wrong: "不正确", cut: "被截断", copies: (n) => `相同的回答采样到 ${n} 次`, update: (n) => `第 ${n} 次优化`, updates: "用于",
  untrained: "没有参与训练：优势为 0 且没有 KL；或因被截断而不训练；或记录超出每步的上限。",
  strongest: "这一步中最强的：", up: "被推高", down: "被压低", not: "不变", clipped: "被裁剪", masked: "不训练（policy_mask）",
  clips: "这一步中被裁剪的：", clip_at: (text, n, u) => `${text}${n > 1 ? ` 及另外 ${n - 1} 个` : ""}，第 ${u} 次优化`, no_clips: "所显示的词元都没有被裁剪",
  intro: "第一次接触 GRPO？怎样读这一页", intro_text: ["模型对每个问题回答若干次，这些回答组成一组。每个回答得到一个奖励。优势表示它的奖励比本组的均值好多少：较好的回答为正，较差的为负；奖励全部相同时都为 0。", "然后，较好回答的每个词元都被推高（更可能出现），较差回答的每个词元都被压低。一个词元受到的推力 = 它在平均中的权重（1 / 词元数）× 优势 × 比率。", "比率是词元现在的概率除以采样时的概率。采样后的第一次优化时它等于 1。之后的优化会裁剪它：已经沿推力方向移动太远的词元不再受推。", "KL 把每个词元拉回训练开始时的模型。"],
  alike: (n) => `，另有 ${n} 个相同`,
  same_push: "比率为 1 时，一个回答的所有词元对 log π 的推力都相同：GRPO 并不知道是哪个词元使答案正确。词元能移动多少取决于它的概率：请把颜色换成“对该词元 logit 的推力”。",
  legend: (m) => `绿色实线：概率变大；红色虚线：概率变小；删除线：被裁剪。最强：${m}`, legend_other: (a, b) => `颜色越深越大：${a} 到 ${b}`,
  prob: "这个词元的概率有多大？", old: "……采样时", same_old: "相同：每次采样只做一次优化，被训练的策略就是采样的策略",
  ratio: "新旧概率之比", ratio_seq: "整个回答的新旧概率之比", adv: "回答的优势", policy: "策略项（要最小化）", slope: "它对 log π 的导数",
  clip_high: (e) => `r 大于 1 + ${e} 且 A 为正：已超过裁剪范围，没有梯度`, clip_low: (e) => `r 小于 1 ${MINUS} ${e} 且 A 为负：已超过裁剪范围，没有梯度`, no_slope: "没有梯度：该词元被裁剪或不参与训练",
  whole_kl: "这个 KL 在整个词表上计算，它的梯度作用于所有 logit，不在对 log π 的推力之内", whole_entropy: "熵奖励也有梯度，它作用于所有 logit，不在对 log π 的推力之内",
  kl: "与参考模型的 KL", kl_slope: "它的导数", weight: "每个词元在损失中的权重", weight_mean: (n, t) => `1 / (${n} 个回答 × ${t} 个词元)`,
  push: "对 log π 的推力 = 损失梯度的相反数", exact: "反向传播给出的梯度", logit: "对该词元自身 logit 的推力", logit_why: "π 接近 1 时接近 0：已无处可去",
  entropy: "分布的熵", nats: "奈特", sampler: "采样器的 log π", token_of: (i, n) => `第 ${i} 个词元，共 ${n} 个`,
  likelier: "这次更新使该词元更可能出现。", unlikelier: "这次更新使该词元更不可能出现。", still: "这次更新不改变该词元。",
  question: "问题", hits: (n) => `找到 ${n} 处`, in_question: "问题",
  ev_acc: (a, b) => `测试准确率：${a} → ${b}`, rose: "上升，超出 95 % 区间", fell: "下降，超出 95 % 区间", unclear: "区间重叠，不能排除偶然",
  alarms_none: "没有出现警报。", alarms_some: (n) => `出现过的警报：${n}`, alarm_steps: (a, b) => a === b ? `第 ${a} 步` : `第 ${a} 到 ${b} 步`,
  inside: "结束时在健康范围内", outside: "结束时不在健康范围内", setting: "选项", value: "值",
  charts: { "eval/accuracy": "测试准确率（贪心），95 % 区间", "rollout/returns": "采样的奖励", "rollout/success_rate": "采样正确的比例", "rollout/completion_tokens": "回答的词元数", "train/kl_divergence": "与参考模型的 KL（奈特）", "train/clipped_share": "被裁剪词元的比例", "rollout/no_spread_share": "奖励全同的组的比例", "train/ratio_mean": "新旧概率比的均值", "train/entropy": "熵（奈特）", "train/grad_norm": "梯度范数" },
},
};
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
    const places = { inside: [], outside: [] };
    for (const chart of data.charts.filter((c) => c.band)) {
      const x = each.metrics.findLast((m) => Number.isFinite(m[chart.name]))?.[chart.name];
      if (x === undefined) continue;
      const good = x >= chart.band[0] && x <= chart.band[1];
      places[good ? "inside" : "outside"].push(`${t("charts")[chart.name]} ${num(x, 3)} (${num(chart.band[0])}–${num(chart.band[1])})`);
    }
    for (const [where, found] of Object.entries(places)) if (found.length) lines.push(`${prefix}${t(where)}: ${found.join("; ")}`);
    const found = alarmsOf(each.metrics);
    lines.push(prefix + (found.length ? t("alarms_some", found.length) : t("alarms_none")));
    for (const one of found) alarms.push(h("p", { className: "alarm" }, h("b", {}, `▲ ${prefix}${one.name}, ${t("alarm_steps", one.first, one.last)}: `), h("span", { lang: "en" }, data.alarms[one.name])));
    if (each.note) lines.push(prefix + each.note);
  });
  $("verdict").replaceChildren(...lines.map((line) => h("li", {}, line)));
  $("alarms").replaceChildren(...alarms);
  $("charts").replaceChildren(...data.charts.map(figure).filter(Boolean));
  $("intro").replaceChildren(h("summary", {}, t("intro")), ...t("intro_text").map((text) => h("p", {}, text)));
}
const W = 300, H = 110, LEFT = 34, BOTTOM = 14;
/** One metric over the steps, of each run: band, interval, line, alarms; or null without values. */
function figure(chart) {
  const series = data.runs.map((each) => each.metrics.filter((m) => Number.isFinite(m[chart.name])));
  const every = series.flat();
  if (!every.length) return null;
  const last = Math.max(1, ...data.runs.flatMap((each) => each.metrics.map((m) => m.step)));
  const values = every.flatMap((m) => [m[chart.name], m[chart.low] ?? m[chart.name], m[chart.high] ?? m[chart.name]]);
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.band) { low = Math.min(low, chart.band[0]); high = Math.max(high, Math.min(chart.band[1], 2 * high - low)); }
  if (low === high) { low -= 0.5; high += 0.5; }
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
      svg.append(s("path", { class: "mark", d: `M${x(one.first) - 5},0 h10 l-5,9 z` }, s("title", {}, `${one.name}: ${data.alarms[one.name]}`)));
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
  const about = h("details", {}, h("summary", {}, t("what")), h("span", { lang: "en" }, `${chart.name}: ${data.meanings[chart.name]}`));
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
  add(t("adv"), advantageFormula(group, c.index, A), paper ? "advantage" : "other_advantage");
  const low = o.clip_eps, high = o.clip_eps_high ?? o.clip_eps, slope = u.policy_gradient[i];
  if (o.surrogate === "clip" && u.policy_gradient) {
    const cut = Math.min(1 + high, Math.max(1 - low, r));
    let term = -Math.min(r * A, cut * A);
    if (o.clip_ratio_c && A < 0) term = Math.min(term, -o.clip_ratio_c * A);
    add(t("policy"), `${MINUS}min(r A, clip(r, 1${MINUS}${num(low)}, 1+${num(high)}) A) = ${MINUS}min(${num(r * A)}, ${num(cut * A)}) = ${num(term)}`, paper ? "policy" : "surrogate:clip");
  } else add(t("policy"), data.surrogates[o.surrogate] ?? o.surrogate, `surrogate:${o.surrogate}`);
  const isClipped = u.clipped.includes(i), isMasked = u.masked.includes(i);
  let why = null;
  if (isMasked) why = t("masked");
  else if (isClipped) why = o.surrogate !== "clip" ? t("no_slope") : A > 0 ? t("clip_high", num(high)) : t("clip_low", num(low));
  const simple = o.surrogate === "clip" && Math.abs(slope + r * A) <= 1e-4 * Math.abs(slope) && !whole;
  add(t("slope"), simple && slope !== 0 ? `${MINUS}r A = ${MINUS}${num(r)} × ${inside(A)} = ${num(slope)}` : num(slope), isClipped ? "clipped" : null, why);
  let klSlope = null;
  if (u.kl) {
    const ref = u.reference?.[i];
    if (u.gradient && o.kl_estimator !== "full") klSlope = (u.gradient[i] / u.weight - slope) / o.kl_weight;
    if (o.kl_estimator === "k3" && ref !== undefined) {
      klSlope = u.kl[i] >= 10 ? 0 : 1 - Math.exp(ref - now); // loss.py's KL_LIMIT
      add(t("kl"), `k3 = π_ref/π ${MINUS} log(π_ref/π) ${MINUS} 1 = ${num(Math.exp(ref - now))} ${MINUS} ${inside(ref - now)} ${MINUS} 1 = ${num(u.kl[i])}`, "kl", `log π_ref = ${num(ref)};  ${t("kl_slope")}: 1 ${MINUS} π_ref/π = ${num(klSlope)}`);
    } else if (o.kl_estimator === "full") add(t("kl"), num(u.kl[i]), null, t("whole_kl"));
    else add(t("kl"), `${o.kl_estimator} = ${num(u.kl[i])}`, "other_kl", ref === undefined ? null : `log π_ref = ${num(ref)}`);
  }
  const length = u.log_probs.length, count = 1 / (u.weight * length);
  const mean = o.loss_agg_mode === "seq-mean-token-mean" && Math.abs(count - Math.round(count)) < 1e-3;
  add(t("weight"), `w = ${mean ? `${t("weight_mean", Math.round(count), length)} = ` : ""}${num(u.weight)}`, paper ? "weight" : "other_weight");
  const p = push(u, i), sum = klSlope === null ? inside(slope) : `(${num(slope)} + ${num(o.kl_weight)} × ${inside(klSlope)})`;
  add(t("push"), `${MINUS}w × ${sum} = ${signed(p)}`, "gradient", u.gradient ? t("exact") : null);
  const q = Math.exp(now), heat = temperature();
  add(t("logit"), `${signed(p)} × (1 ${MINUS} ${num(q)})${heat === 1 ? "" : ` / ${num(heat)}`} = ${signed(TINTS.logit(u, i))}`, null, t("logit_why"));
  add(t("entropy"), `${num(u.entropies[i])} ${t("nats")}`, "entropy", o.entropy_weight > 0 ? t("whole_entropy") : null);
  if (u.sampler) add(t("sampler"), num(u.sampler[i]), null);
  return lines;
}
/** The advantage with its numbers, where the paper's equation gives it; else its value. */
function advantageFormula(group, index, A) {
  const R = scored(group.returns), own = group.returns[index];
  if (own === null || group.all !== group.returns.length) return `A = ${num(A)}`;
  const m = average(R), sd = deviation(R), full = (own - m) / (sd + 1e-4), centred = own - m;
  if (Math.abs(full - A) < 1e-3) return `A = (R ${MINUS} mean) / (std + 0.0001) = (${num(own)} ${MINUS} ${inside(m)}) / (${num(sd)} + 0.0001) = ${num(A)}`;
  if (Math.abs(centred - A) < 1e-3) return `A = R ${MINUS} mean = ${num(own)} ${MINUS} ${inside(m)} = ${num(A)}`;
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
    h("p", { className: p > 0 ? "goes-up" : p < 0 ? "goes-down" : "" }, t(verdict), u.clipped.includes(i) ? ` (${t("clipped")})` : ""),
    h("dl", {}, explain(c, u, i)));
}
function noToken() {
  state.token = null;
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
  $("slider").setAttribute("aria-valuetext", `${t("step")} ${now.step}`);
  $("step-name").textContent = `${now.step} / ${steps.at(-1).step}`;
  $("step-note").textContent = [now.every > 1 ? t("thinned", now.every) : "", now.groups.length < now.all ? t("shown_of", now.groups.length, now.all) : "", now.completions.some((c) => updateOf(c) && samePush(updateOf(c))) ? t("same_push") : ""].join(" ").trim();
  const order = ordered(), largest = Math.max(1e-30, ...order.map((each) => Math.abs(each.value))), bySign = SIGNED.includes(state.tint);
  if (order.length) $("legend").replaceChildren(h("span", {}, bySign ? t("legend", num(state.tint === "ratio" ? Math.exp(largest) : largest)) : t("legend_other", num(order.at(-1).value), num(order[0].value))));
  if (order.length && bySign) {
    const ends = [...strongest(order.filter((x) => x.value > 0)), ...strongest(order.filter((x) => x.value < 0).reverse())];
    $("strongest").replaceChildren(h("span", {}, t("strongest"), " "), ...ends.map(({ k, i, value, alike }) => h("button", { type: "button", onclick: () => { showToken(k, i, true); } }, `${value > 0 ? "▲" : "▼"} ${named(now.completions[k].tokens[i])} ${signed(value)}${alike > 1 ? t("alike", alike - 1) : ""}`)));
  }
  const clips = now.completions.flatMap((c, k) => (c.updates ?? []).map((u, n) => ({ c, k, u, n }))).filter(({ u }) => u.clipped.length);
  if (now.completions.some((c) => (c.updates ?? []).some((u) => u.old))) {
    const buttons = clips.slice(0, 6).map(({ c, k, u, n }) => h("button", { type: "button", onclick: () => { c.chosen = n; showStep(); showToken(k, u.clipped[0], true); } }, t("clip_at", named(c.tokens[u.clipped[0]]), u.clipped.length, u.update)));
    $("strongest").append(h("div", {}, h("span", {}, t("clips"), " "), ...(buttons.length ? buttons : [h("span", { className: "note" }, t("no_clips"))])));
  }
  const withTokens = now.groups.filter((g) => now.completions.some((c) => c.group === g.group)), rest = now.groups.filter((g) => !withTokens.includes(g));
  withTokens.sort((a, b) => now.completions.findIndex((c) => c.group === a.group) - now.completions.findIndex((c) => c.group === b.group));
  const parts = withTokens.map((g) => groupOf(g, largest));
  if (rest.length) parts.push(h("details", {}, h("summary", {}, t("more_groups", rest.length)), rest.map((g) => groupOf(g, largest))));
  $("groups").replaceChildren(...parts);
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
    idle ? h("p", {}, "⚠ ", t("idle"), now.objective.kl_weight > 0 && !now.objective.kl_in_reward ? t("idle_kl") : "", state.lang === "zh" ? "。" : ".") : null,
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
  return h("section", { className: "completion" }, h("b", {}, facts.join(" · ")), " ", buttons, tokens, u ? null : h("p", { className: "note" }, t("untrained")));
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
  element.addEventListener("click", () => showToken(k, i));
  return element;
}
function goTo(step) {
  state.step = Math.max(0, Math.min(run().steps.length - 1, step));
  showStep();
  $("charts").replaceChildren(...data.charts.map(figure).filter(Boolean));
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
  state.sides ??= { question: 0, left: both ? lastOf(0) : 0, right: all.length - 1 };
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
  $("settings").replaceChildren(h("details", {}, h("summary", {}, t("settings_head")), h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, t("setting")), data.runs.map((each) => h("th", {}, each.name)))), h("tbody", {}, names.map((name) => h("tr", {}, h("th", { scope: "row" }, name), data.runs.map((each) => h("td", {}, visible(JSON.stringify(each.settings[name]) ?? "–")))))))));
}

// --------------------------------------------------------------------------------- all of it

function render() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = `${data.runs.map((each) => each.name).join(", ")} · pocket-grpo`;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = t(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  $("language").textContent = t("other");
  $("names").textContent = data.runs.map((each) => each.name).join(" · ");
  $("run-choice").hidden = data.runs.length < 2;
  $("run").replaceChildren(...data.runs.map((each, i) => h("option", { value: i, selected: i === state.run }, each.name)));
  $("tint").replaceChildren(...Object.keys(TINTS).map((name) => h("option", { value: name, selected: name === state.tint }, t(`tint_${name}`))));
  glance(); showStep(); showAnswers(); showSettings();
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
  if (!token || mouse === before) return;
  const k = Number(token.dataset.k), i = Number(token.dataset.i);
  if (state.token?.k !== k || state.token?.i !== i) showToken(k, i);
});
state.step = Math.max(0, run().steps.findIndex((each) => each.completions.some((c) => c.updates)));
render();
})();
