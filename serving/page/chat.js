// One answer: from the conversation so far to a request, and from the chunks that come back to the answer.
//
//   answerTurn(conversation, 1, 0, {context: 512, signal, changed})    turn 1 in column 0; `changed` after each chunk
//
// A model is sent its own column of the conversation. Where that leaves no room for an answer in the context, the oldest
// turns are left out, one more with each attempt; answer.leftOut counts them.

import { Lost, Refused, chat } from "./api.js";
import { newAnswer } from "./store.js";

/** Messages of turns `start` .. `number`, in OpenAI's form. A turn that got no answer is not sent again. */
export function messagesOf(conversation, number, column, start) {
  const { settings, turns } = conversation;
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  for (const { user, answers } of turns.slice(start, number)) {
    const answer = answers[column] ?? answers[0];
    if (answer.content || answer.calls.length) messages.push({ role: "user", content: user }, assistant(answer));
  }
  return [...messages, { role: "user", content: turns[number].user }];
}

function assistant({ content, reasoning, calls }) {
  return {
    role: "assistant",
    content,
    ...(reasoning && { reasoning_content: reasoning }),
    ...(calls.length && { tool_calls: calls }),
  };
}

/** Never throws: how it went is the answer's state. Resolves to whether a key is needed. */
export async function answerTurn(conversation, number, column, { context, signal, changed }) {
  const answer = conversation.turns[number].answers[column];
  const before = conversation.settings.alone ? [] : (conversation.turns[number - 1]?.answers ?? []);
  answer.leftOut = (before[column] ?? before[0])?.leftOut ?? 0;
  try {
    while (!(await attempt(conversation, number, column, { context, signal, changed }))) {
      Object.assign(answer, newAnswer(answer.model), { leftOut: answer.leftOut + 1 });
    }
  } catch (error) {
    if (signal.aborted) answer.state = "stopped";
    else if (error instanceof Lost) answer.state = "lost";
    else Object.assign(answer, { state: "refused", problem: error.message });
    if (answer.state === "refused" && !(error instanceof Refused)) console.error(error); // a mistake, here or there
    return error.status === 401;
  } finally {
    changed();
  }
  return false;
}

/** Whether the context had room. Where not even the last message has, the server's refusal is thrown. */
async function attempt(conversation, number, column, { context, signal, changed }) {
  const answer = conversation.turns[number].answers[column];
  const { system, seed, alone, ...sampling } = conversation.settings;
  const start = alone ? number : answer.leftOut;
  const messages = messagesOf(conversation, number, column, start);
  const request = { model: answer.model, messages, ...sampling, ...(seed !== null && { seed }) };
  const clock = { start: performance.now(), first: null };
  try {
    for await (const chunk of chat(request, signal)) {
      take(answer, chunk, clock);
      changed();
    }
  } catch (error) {
    if (error.code === "context_length_exceeded" && start < number) return false;
    throw error;
  }
  if (answer.state === "running") answer.state = "done";
  const room = Math.min(sampling.max_tokens, context / 4); // that an answer should have
  return answer.state !== "cut" || answer.tokens >= room || start === number;
}

/** Put a chunk into the answer. Until the server counts its tokens at the end, a chunk is taken for one. */
function take(answer, { choices, usage }, clock) {
  const now = performance.now();
  for (const { delta = {}, finish_reason: reason } of choices ?? []) {
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      clock.first ??= now;
      answer.first = (clock.first - clock.start) / 1000;
      answer.seconds = (now - clock.first) / 1000;
      answer.tokens += 1;
    }
    answer.content += delta.content ?? "";
    answer.reasoning += delta.reasoning_content ?? "";
    for (const call of delta.tool_calls ?? []) addCall(answer.calls, call);
    if (reason) answer.state = reason === "length" ? "cut" : "done";
  }
  if (usage) answer.tokens = usage.completion_tokens;
}

/** A call comes whole, or its arguments piece by piece under the same index. */
function addCall(calls, { index = calls.length, id, function: { name, arguments: text = "" } = {} }) {
  calls[index] ??= { id, type: "function", function: { name, arguments: "" } };
  calls[index].function.arguments += text;
}
