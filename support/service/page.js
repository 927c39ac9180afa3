// The page of serve.py: a question goes to /solve_question, and its answers come while they are written.
// What a model has written is hostile text: it enters the page by textContent alone.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------------------- words of the page

const WORDS = {
en: {
  title: "Ask", skip: "to the answers", theme: "light / dark", other: "中文",
  question: "Question", example: "from the test set", choose: "choose one", reference: "right answer, if you know it",
  model: "model", both: "both, side by side", trained: "trained", base: "before training",
  samples: "answers", greedy: "1, greedy (the likeliest token each time)", sampled: (n) => `${n} samples, as in training`,
  temperature: "temperature", key: "key of this server", ask: "Ask", stop: "Stop", hint: "Ctrl+Enter asks, Escape stops.",
  answers: "Answers", none: "Nothing was asked yet.", writing: "The model is writing …", waiting: "Waiting for its turn …", stopped: "Stopped.", failed: "",
  done: (s) => `Answered in ${s} s.`, seed: (n) => ` Seed ${n}: with it, the API gives the same samples again.`,
  reasoning: (n) => `Reasoning (${n} characters)`, no_reasoning: "no <think> tag", no_answer: "no <answer> tag", whole: "The whole completion",
  right: "right", wrong: "not right", reward: (r) => `reward ${r}`, advantage: (a) => `advantage ${a}`,
  up: "training would make it likelier", down: "training would make it less likely", still: "training would leave it as it is",
  tokens: (n) => `${n} tokens`, cut: "cut off", sample: (i) => `Sample ${i}`,
  compared: (names) => `Rewards: ${names}. The advantage says how much better an answer is than the others of its group: the tokens of one above 0 would be made likelier by training, those of one below 0 less likely. Where all rewards are equal, nothing is learned.`,
  right_of: (a, b) => `${a} of ${b} right`, unreachable: "The server cannot be reached; is it running?", broken: "The answer broke off; the server may have been stopped.",
},
zh: {
  title: "提问", skip: "跳到回答", theme: "浅色 / 深色", other: "English",
  question: "问题", example: "测试集中的题目", choose: "请选择", reference: "正确答案（如果知道）",
  model: "模型", both: "两个模型并排", trained: "训练后", base: "训练前",
  samples: "回答数", greedy: "1 个，贪心（每次取概率最大的词元）", sampled: (n) => `${n} 个采样，与训练时相同`,
  temperature: "温度", key: "本服务的密钥", ask: "提问", stop: "停止", hint: "Ctrl+Enter 提问，Escape 停止。",
  answers: "回答", none: "还没有提问。", writing: "模型正在回答……", waiting: "正在排队……", stopped: "已停止。", failed: "",
  done: (s) => `用时 ${s} 秒。`, seed: (n) => `种子 ${n}：用它调用接口会得到相同的采样。`,
  reasoning: (n) => `推理过程（${n} 个字符）`, no_reasoning: "没有 <think> 标签", no_answer: "没有 <answer> 标签", whole: "完整的回答",
  right: "正确", wrong: "不正确", reward: (r) => `奖励 ${r}`, advantage: (a) => `优势 ${a}`,
  up: "训练会提高它的概率", down: "训练会降低它的概率", still: "训练不会改变它",
  tokens: (n) => `${n} 个词元`, cut: "被截断", sample: (i) => `采样 ${i}`,
  compared: (names) => `奖励：${names}。优势表示一个回答比同组其他回答好多少：大于 0 的回答，训练会提高其词元的概率；小于 0 的会降低。奖励全部相同时，什么也学不到。`,
  right_of: (a, b) => `${b} 个中 ${a} 个正确`, unreachable: "连接不到服务；它在运行吗？", broken: "回答中断了；服务可能已停止。",
},
};
const state = { lang: navigator.language.startsWith("zh") ? "zh" : "en", asking: null, cards: new Map(), result: null, note: ["none"] };
const t = (word, ...values) => { const found = WORDS[state.lang][word]; return typeof found === "function" ? found(...values) : found; };

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
const signed = (x) => (x > 0 ? "+" : x < 0 ? "\u2212" : "") + Math.abs(x).toFixed(2);

// ---------------------------------------------------------------------------- the answers

function columns(names, count) {
  state.cards.clear();
  $("columns").replaceChildren(...names.map((name) => {
    const column = element("section", "column");
    const head = element("h3");
    head.dataset.model = name;
    column.append(head);
    for (let i = 0; i < count; i++) {
      const card = element("article", "card");
      card.append(element("div", "text"));
      state.cards.set(`${name} ${i}`, { card, text: "", row: null, sample: count > 1 ? i + 1 : 0 });
      column.append(card);
    }
    return column;
  }));
}

// While it is being written: the text as it is.
function write(event) {
  const place = state.cards.get(`${event.model} ${event.sample}`);
  place.text += event.text;
  place.card.firstChild.textContent = place.text;
}

function folded(title, text) {
  const details = element("details");
  const body = element("div", "text", text);
  body.dir = "auto";
  details.append(element("summary", "", title), body);
  return details;
}

// Written to the end: the answer, what it is worth, and the reasoning folded.
function show(place) {
  const row = place.row, card = place.card;
  const open = [...card.querySelectorAll("details")].map((each) => each.open);
  const answer = element("div", "answer", row.final_answer || t("no_answer"));
  answer.dir = "auto";
  card.replaceChildren(...(place.sample ? [element("div", "note", t("sample", place.sample))] : []), answer);
  const badges = element("div");
  const badge = (text, kind = "") => badges.append(element("span", `badge ${kind}`, text));
  card.classList.toggle("right", row.correct === true);
  card.classList.toggle("wrong", row.correct === false);
  if (row.correct !== undefined) badge(row.correct ? `✓ ${t("right")}` : `✗ ${t("wrong")}`, row.correct ? "up" : "down");
  if (row.reward !== undefined) badge(t("reward", Number(row.reward.toFixed(3))));
  if (row.advantage !== undefined) {
    const kind = row.advantage > 0 ? "up" : row.advantage < 0 ? "down" : "still";
    badge(`${kind === "up" ? "▲ " : kind === "down" ? "▼ " : ""}${t("advantage", signed(row.advantage))}: ${t(kind)}`, kind);
  }
  badge(t("tokens", row.tokens) + (row.truncated ? `, ${t("cut")}` : ""));
  card.append(badges);
  if (row.reasoning_process) card.append(folded(t("reasoning", row.reasoning_process.length), row.reasoning_process));
  else badge(t("no_reasoning"));
  card.append(folded(t("whole"), row.assistant_response));
  card.querySelectorAll("details").forEach((each, i) => { each.open = open[i] ?? (i > 0 && !row.final_answer); });
}

function finish(result) {
  state.result = result;
  const seen = {};
  for (const row of result.answers || [{ ...result.data, model: state.asking.model }]) {
    const i = seen[row.model] = (seen[row.model] ?? -1) + 1;
    state.cards.get(`${row.model} ${i}`).row = row;
  }
  state.note = ["done", (result.elapsed_milliseconds / 1000).toFixed(1)];
}

function render() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  for (const each of document.querySelectorAll("[data-word]")) each.textContent = t(each.dataset.word);
  $("language").textContent = t("other");
  $("name").textContent = data.name;
  for (const option of document.querySelectorAll("option[data-say]")) option.textContent = t(option.dataset.say, option.value);
  $("status").textContent = t(...state.note) + (state.result?.seed !== undefined ? t("seed", state.result.seed) : "");
  const places = [...state.cards.values()];
  for (const place of places) if (place.row) show(place);
  for (const head of document.querySelectorAll("h3[data-model]")) {
    const own = [...state.cards].filter(([name, place]) => name.startsWith(`${head.dataset.model} `) && place.row?.correct !== undefined);
    const right = own.filter(([, place]) => place.row.correct).length;
    head.textContent = t(head.dataset.model) + (own.length > 1 ? `: ${t("right_of", right, own.length)}` : "");
  }
  const compared = places.some((place) => place.row?.advantage !== undefined);
  $("compared").textContent = compared ? t("compared", data.rewards.join(", ")) : "";
}

// ---------------------------------------------------------------------------- asking

function fail(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = false;
}

// The events of a response: lines of `data: {…}`, with an empty line after each.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice("data: ".length));
  }
}

async function ask() {
  state.asking?.control.abort();
  const samples = Number($("samples").value), model = $("model").value;
  const asked = { question: $("question").value, model, stream: true, n: samples };
  if ($("reference").value.trim()) asked.reference = $("reference").value.trim();
  if (samples > 1) asked.temperature = Number($("temperature").value);
  const asking = state.asking = { control: new AbortController(), model };
  $("error").hidden = true;
  state.result = null;
  state.note = ["waiting"];
  columns(model === "both" ? ["base", "trained"] : [model], samples);
  $("stop").hidden = false;
  render();
  try {
    const headers = { "Content-Type": "application/json" };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    const response = await fetch("/solve_question", { method: "POST", headers, body: JSON.stringify(asked), signal: asking.control.signal });
    if (!response.ok) throw new Error((await response.json()).message);
    for await (const event of events(response)) {
      if (state.asking !== asking) return;
      if (event.text !== undefined) {
        write(event);
        if (state.note[0] === "waiting") { state.note = ["writing"]; render(); }
      } else if (event.code === 200) finish(event);
      else throw new Error(event.message);
    }
    if (!state.result) throw new Error(t("broken"));
  } catch (error) {
    if (state.asking !== asking) return;
    const stopped = error.name === "AbortError";
    state.note = [stopped ? "stopped" : "failed"];
    if (!stopped) fail(error instanceof TypeError ? t(state.cards.values().next().value?.text ? "broken" : "unreachable") : error.message);
    if (!stopped && ![...state.cards.values()].some((place) => place.text)) { state.cards.clear(); $("columns").replaceChildren(); }
  }
  state.asking = null;
  $("stop").hidden = true;
  render();
}

// ---------------------------------------------------------------------------- begin

function option(value, say, text = "") {
  const made = element("option", "", text);
  made.value = value;
  if (say) made.dataset.say = say;
  return made;
}
const both = data.models.length > 1;
$("model").append(...(both ? [option("both", "both")] : []), ...data.models.map((name) => option(name, name)));
$("model-choice").hidden = !both;
$("samples").append(option("1", "greedy"), ...[4, 8, 16].filter((n) => n < data.samples).concat(data.samples > 1 ? [data.samples] : []).map((n) => option(String(n), "sampled")));
$("temperature").value = data.temperature;
$("key-choice").hidden = !data.key;
$("example").append(option("", "choose"), ...data.examples.map((each, i) => option(String(i), "", each.question.length > 90 ? each.question.slice(0, 90) + " …" : each.question)));
$("example-choice").hidden = !data.examples.length;
$("samples").onchange = () => { $("heat").hidden = $("samples").value === "1"; };
$("samples").onchange();
let filled = "";
$("example").onchange = () => {
  const example = data.examples[Number($("example").value)];
  if ($("example").value === "" || !example) return;
  $("question").value = filled = example.question;
  $("reference").value = example.reference;
};
// The right answer of an example is not that of another question.
$("question").oninput = () => {
  if (filled && $("question").value !== filled) { filled = ""; $("reference").value = ""; $("example").value = ""; }
};
$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("stop").onclick = () => state.asking?.control.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.asking?.control.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("language").onclick = () => { state.lang = state.lang === "zh" ? "en" : "zh"; render(); };
$("theme").onclick = () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};
render();
})();
