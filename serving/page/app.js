// The page at work: what is shown now, and what each button and key does.
//
//   store.js  conversations in the browser    api.js    the server      chat.js      one answer
//   view.js   a turn's elements               words.js  what is said    settings.js  dialogs and colours
//
// One conversation is shown, `state.current`. Answers go on coming into those that are not shown; `state.running` knows
// them. Elements are made once for what they show and stay with it (`made`), so that while an answer comes, thoughts stay
// open, a message goes on being edited, and the focus is where it was.

import { Refused, listModels } from "./api.js";
import { answerTurn } from "./chat.js";
import { askKey, nextTheme, showTheme, wireSettings } from "./settings.js";
import {
  newAnswer, newConversation, preference, readConversations, remove, save, setPreference, stopAll, title, whenChangedElsewhere,
} from "./store.js";
import { AnswerView, element, fit, iconButton, messageElement, submits } from "./view.js";
import { fillWords, say, setLanguage } from "./words.js";

const $ = (id) => document.getElementById(id);
const state = { models: [], conversations: [], current: null, running: new Map(), full: false };
let made = new WeakMap(); // answer -> AnswerView; turn, conversation -> element
const drawing = new Set(); // answers of which more has come since the last frame
const saving = new Map(); // conversation id -> timer
let undoing; // timer

// Asking ---------------------------------------------------------------------------------------------------------

function send(text) {
  const conversation = state.current;
  if (!text.trim() || state.running.has(conversation.id) || !conversation.models.length) return false;
  if (!state.conversations.includes(conversation)) state.conversations.push(conversation);
  conversation.turns.push({ user: text, answers: conversation.models.map(newAnswer) });
  showAddress();
  answer(conversation, conversation.turns.length - 1, [...conversation.models.keys()]);
  return true;
}

/** What followed the message is gone: the conversation goes on from here. */
function resend(number, text) {
  stop();
  state.current.turns.length = number;
  state.running.delete(state.current.id);
  send(text);
}

/** The last turn's answers in these columns are asked for again. */
function again(columns) {
  const { turns, models } = state.current;
  if (!turns.length || state.running.has(state.current.id)) return;
  const { answers } = turns.at(-1);
  for (const column of columns) answers[column] = newAnswer(models[column] ?? answers[column].model);
  answer(state.current, turns.length - 1, columns);
}

async function answer(conversation, number, columns) {
  const controller = new AbortController();
  state.running.set(conversation.id, controller);
  conversation.updated = Date.now();
  keep(conversation);
  draw();
  toEnd();
  announce(say("answering"));
  const { answers } = conversation.turns[number];
  const keysNeeded = await Promise.all(columns.map((column) => answerTurn(conversation, number, column, {
    context: state.models.find(({ id }) => id === answers[column].model)?.context,
    signal: controller.signal,
    changed: () => changed(conversation, answers[column]),
  })));
  if (state.running.get(conversation.id) === controller) state.running.delete(conversation.id);
  drawAnswers();
  keep(conversation);
  draw();
  announce(columns.filter((column) => answers[column].tokens).map((column) => say("answered", answers[column].tokens)).join(". "));
  if (keysNeeded.includes(true)) {
    await askKey();
    columns.forEach((column) => (answers[column] = newAnswer(answers[column].model)));
    answer(conversation, number, columns);
  }
}

/** More of an answer is there: it is shown with the next frame, and saved every second. */
function changed(conversation, answer) {
  if (!drawing.size) requestAnimationFrame(drawAnswers);
  drawing.add(answer);
  if (!saving.has(conversation.id)) saving.set(conversation.id, setTimeout(() => keep(conversation), 1000));
}

function drawAnswers() {
  const follow = atEnd();
  for (const answer of drawing) made.get(answer)?.update();
  drawing.clear();
  if (follow) toEnd();
}

function stop() {
  state.running.get(state.current.id)?.abort();
}

/** Save it, unless it has been deleted meanwhile. */
function keep(conversation) {
  clearTimeout(saving.get(conversation.id));
  saving.delete(conversation.id);
  if (!state.conversations.includes(conversation)) return;
  conversation.saved = Date.now();
  const full = !save(conversation);
  if (full !== state.full) notice(full ? say("storageFull") : "");
  state.full = full;
}

// Conversations --------------------------------------------------------------------------------------------------

function open(conversation) {
  state.current = conversation;
  const known = conversation.models.filter((id) => state.models.some((model) => model.id === id));
  if (state.models.length) conversation.models = known.length ? known : firstModels();
  showAddress();
  document.body.classList.remove("drawer");
  draw();
  toEnd();
  focusMessage();
}

/** So that the page, loaded again, shows the same conversation. */
function showAddress() {
  const { turns, id } = state.current;
  history.replaceState(null, "", turns.length ? `#${id}` : location.pathname);
}

function begin() {
  open(newConversation(firstModels()));
}

/** Those last talked to, where they are served; else the first that chats. */
function firstModels() {
  const chats = state.models.filter(({ chat }) => chat).map(({ id }) => id);
  const last = preference("models", []).filter((id) => chats.includes(id));
  return last.length ? last : chats.slice(0, 1);
}

function discard(conversation) {
  state.running.get(conversation.id)?.abort();
  state.conversations = state.conversations.filter((each) => each !== conversation);
  remove(conversation);
  if (conversation === state.current) begin();
  else draw();
  offerUndo(() => {
    state.conversations.push(conversation);
    keep(conversation);
    open(conversation);
  });
}

function offerUndo(undo) {
  const button = $("undo").querySelector("button");
  const hide = () => {
    if (document.activeElement === button) focusMessage();
    $("undo").hidden = true;
  };
  clearTimeout(undoing);
  undoing = setTimeout(hide, 8000);
  $("undo").hidden = false;
  button.onclick = () => (hide(), undo());
  button.focus();
}

function neighbour(step) {
  const shown = sorted();
  const place = shown.indexOf(state.current);
  const next = shown[place === -1 ? 0 : place + step];
  if (next) open(next);
}

const sorted = () => [...state.conversations].sort((a, b) => b.updated - a.updated);

/** Another tab wrote: take what it wrote, but for what is being answered here. */
function reload() {
  const mine = (conversation) => state.running.has(conversation.id);
  const theirs = readConversations().filter((conversation) => !mine(conversation));
  const own = new Map(state.conversations.map((conversation) => [conversation.id, conversation]));
  const fresh = theirs.map((each) => (own.get(each.id)?.saved === each.saved ? own.get(each.id) : each));
  state.conversations = [...state.conversations.filter(mine), ...fresh];
  state.current = state.conversations.find(({ id }) => id === state.current.id) ?? state.current;
  draw();
}

// Drawing --------------------------------------------------------------------------------------------------------

function draw() {
  const { turns, models } = state.current;
  const running = state.running.has(state.current.id);
  document.title = $("title").textContent = title(state.current) || "Seedling";
  document.body.classList.toggle("two", models.length > 1);
  $("empty").hidden = turns.length > 0;
  $("about").replaceChildren(...models.map(aboutModel));
  place($("turns"), turns.map(turnElement));
  $("send").hidden = running;
  $("stop").hidden = !running;
  place($("conversations"), sorted().map(conversationElement));
  drawModels();
}

/** Make these an element's children, touching only those that change. */
function place(parent, children) {
  for (const old of [...parent.children]) if (!children.includes(old)) old.remove();
  children.forEach((child, i) => child === parent.children[i] || parent.insertBefore(child, parent.children[i] ?? null));
}

/** What stands for a thing on the page; `make` is called the first time. */
function elementOf(thing, make) {
  if (!made.has(thing)) made.set(thing, make());
  return made.get(thing);
}

function turnElement(turn, number) {
  const section = elementOf(turn, () => element("section", { className: "turn" },
    messageElement(turn.user, (text) => resend(number, text)), element("div", { className: "answers" })));
  const named = turn.answers.length > 1;
  place(section.lastChild, turn.answers.map((answer, column) =>
    elementOf(answer, () => new AnswerView(answer, { named, again: () => again([column]) })).element));
  return section;
}

function conversationElement(conversation) {
  const name = title(conversation);
  const item = elementOf(conversation, () => element("li", {},
    element("button", { className: "conversation", onclick: () => open(conversation) }),
    iconButton("delete", say("delete", name), () => discard(conversation))));
  item.firstChild.textContent = name;
  item.firstChild.ariaCurrent = conversation === state.current ? "true" : null;
  return item;
}

function drawModels() {
  const { models } = state.current;
  const labels = models.length > 1 ? ["modelA", "modelB"] : ["model"];
  const shown = JSON.stringify([models, labels.map((label) => say(label)), state.models]);
  $("compare").hidden = state.models.filter(({ chat }) => chat).length < 2;
  $("compare").ariaPressed = String(models.length > 1);
  if ($("models").dataset.shown === shown) return; // a list that is open stays open
  $("models").dataset.shown = shown;
  $("models").replaceChildren(...models.map((chosen, column) => element("select", {
    ariaLabel: say(labels[column]), title: say(labels[column]),
    onchange: ({ target }) => choose(state.current.models.with(column, target.value)),
  }, ...state.models.map(({ id, chat }) => element("option", {
    value: id, selected: id === chosen, disabled: !chat, textContent: chat ? id : `${id} (${say("notChat")})`,
  })))));
}

function choose(models) {
  state.current.models = models;
  setPreference("models", models);
  keep(state.current);
  draw();
}

function compare() {
  const [first] = state.current.models;
  const other = state.models.find(({ id, chat }) => id !== first && chat);
  choose(state.current.models.length > 1 ? [first] : [first, other.id]);
}

function aboutModel(id) {
  const { parameters, context } = state.models.find((model) => model.id === id) ?? {};
  return element("span", {}, element("b", {}, id), parameters ? ` ${say("about", parameters, context)}` : "");
}

const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => $("log").scrollTo({ top: $("log").scrollHeight });
const announce = (text) => ($("status").textContent = text);

/** A line above the message box; with `retry` a button that calls it. */
function notice(text, retry) {
  $("notice").hidden = !text;
  $("notice").querySelector("span").textContent = text;
  const button = $("notice").querySelector("button");
  button.hidden = !retry;
  button.onclick = retry;
}

/** Where a keyboard would cover half the screen it is not called up unasked. */
function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) $("message").focus();
}

// Keys and language -----------------------------------------------------------------------------------------------

function speak(language) {
  setPreference("language", language);
  setLanguage(language);
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  made = new WeakMap(); // all is made again in the new language
  fillWords(document);
  showTheme();
  Object.assign($("language-switch"), { ariaLabel: say("language"), title: say("language") });
  $("keys-list").replaceChildren(...SHORTCUTS.flatMap(([keys, word]) => [
    element("dt", {}, ...keys.split(" ").map((key) => element("kbd", {}, key))), element("dd", {}, say(word)),
  ]));
  if (state.current) draw();
}

const SHORTCUTS = [
  ["Enter", "keySend"], ["Shift Enter", "keyLine"], ["Esc", "keyStop"], ["↑", "keyEdit"], ["Alt N", "keyNew"],
  ["Alt R", "keyAgain"], ["Alt ↑ ↓", "keyOther"], ["/", "keyMessage"], ["?", "keyHelp"],
];

/** Alt with a letter is known by the key's place: on some keyboards it writes another letter. */
const ALT = {
  KeyN: begin,
  KeyR: () => again([...(state.current.turns.at(-1)?.answers.keys() ?? [])]),
  ArrowUp: () => neighbour(-1),
  ArrowDown: () => neighbour(1),
};

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const writing = event.target.matches("textarea, input, select");
  const plain = { "/": () => $("message").focus(), "?": () => $("keys-dialog").showModal() };
  const action = event.key === "Escape" ? escape : event.altKey ? ALT[event.code] : !writing && plain[event.key];
  if (!action || event.isComposing || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  action();
}

function escape() {
  if (document.body.classList.contains("drawer")) closeDrawer();
  else stop();
}

function onMessageKey(event) {
  if (submits(event)) {
    event.preventDefault();
    sendMessage();
  } else if (event.key === "ArrowUp" && !event.altKey && $("message").value === "") {
    event.preventDefault();
    $("turns").querySelector(".turn:last-child .edit")?.click();
  }
}

function sendMessage() {
  if (!send($("message").value)) return;
  $("message").value = "";
  fit($("message"));
  focusMessage();
}

function closeDrawer() {
  document.body.classList.remove("drawer");
  $("menu-open").focus();
}

// Start ----------------------------------------------------------------------------------------------------------

function wire() {
  $("send").onclick = sendMessage;
  $("stop").onclick = () => (stop(), focusMessage());
  $("message").onkeydown = onMessageKey;
  $("message").oninput = () => fit($("message"));
  $("new").onclick = begin;
  $("compare").onclick = compare;
  $("menu-open").onclick = () => (document.body.classList.add("drawer"), $("new").focus());
  $("scrim").onclick = closeDrawer;
  wireSettings(() => state.current, () => keep(state.current));
  $("keys-open").onclick = () => $("keys-dialog").showModal();
  $("theme-switch").onclick = nextTheme;
  $("language-switch").onclick = () => speak(document.documentElement.lang === "en" ? "zh" : "en");
  $("to-end").onclick = toEnd;
  $("log").onscroll = () => ($("to-end").hidden = atEnd());
  document.querySelectorAll("[data-close]").forEach((button) => (button.onclick = () => button.closest("dialog").close()));
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => state.conversations.filter(({ id }) => state.running.has(id)).forEach(keep));
  whenChangedElsewhere(reload);
}

async function connect() {
  try {
    state.models = await listModels();
    notice(state.models.length ? "" : say("noModels"));
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return askKey().then(connect);
    notice(error instanceof Refused ? say("refused", error.message) : say("unreachable"), connect);
  }
  open(state.current);
}

speak(preference("language", navigator.language.startsWith("zh") ? "zh" : "en"));
wire();
state.conversations = readConversations();
stopAll(state.conversations);
const asked = state.conversations.find(({ id }) => `#${id}` === location.hash);
state.current = asked ?? newConversation([]);
connect();
