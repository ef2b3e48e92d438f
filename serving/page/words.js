// What the page says, in English and Chinese.
//
//   say("retry")                  -> "Try again"    or "重试"
//   say("tokens", 1), ("tokens", 12) -> "1 token", "12 tokens"    or "1 个 token", "12 个 token"
//   say("noSuchWord")             -> an error: a word that is missing is a mistake here, not an empty button

const count = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;
const large = (number) =>
  number >= 1e9 ? `${(number / 1e9).toFixed(1)} B` : number >= 1e6 ? `${(number / 1e6).toFixed(1)} M` : `${number}`;

export const WORDS = {
  en: {
    again: "Answer again",
    alone: "Each message on its own, without those before it",
    answering: "Answering …",
    answerOf: (model) => `Answer of ${model}`,
    answered: (number) => `Answered, ${count(number, "token")}`,
    caution: "Small models make things up. Chats stay in this browser.",
    close: "Close",
    compare: "Two models side by side",
    connectionLost: "The connection was lost while the answer came. What had come is kept.",
    conversation: "Conversation",
    conversations: "Conversations",
    copied: "Copied",
    copy: "Copy",
    copyCode: "Copy code",
    cut: "cut at its longest",
    delete: (title) => `Delete “${title}”`,
    deleted: "Conversation deleted",
    edit: "Edit message",
    editHint: "Sending asks again from here; what follows is replaced.",
    cancel: "Cancel",
    first: (seconds) => `first token after ${seconds.toFixed(2)} s`,
    key: "API key",
    keyHint: "It is kept until this tab is closed, and sent to this server alone.",
    keyNeeded: "This server asks for a key.",
    keyWrong: "This key was not accepted.",
    language: "中文",
    leftOut: (number) =>
      `The context is full: the model no longer sees the first ${number === 1 ? "exchange" : `${number} exchanges`}.`,
    maxTokens: "Longest answer (tokens)",
    message: "Write a message",
    model: "Model",
    modelA: "Left model",
    modelB: "Right model",
    about: (parameters, context) => `${large(parameters)} parameters · context ${context.toLocaleString("en")} tokens`,
    newConversation: "New conversation",
    noModels: "This server has no model to chat with.",
    notChat: "not for chat",
    refused: (message) => `The server answered: ${message}`,
    retry: "Try again",
    save: "Save",
    seed: "Seed",
    seedHint: "random",
    send: "Send",
    serverLost: "The server cannot be reached. Your message is kept.",
    settings: "Settings",
    settingsHint: "For this conversation and new ones.",
    shortcuts: "Keyboard shortcuts",
    speed: (rate) => `${rate >= 10 ? Math.round(rate) : rate.toFixed(1)} tokens/s`,
    stop: "Stop",
    stopped: "stopped",
    storageFull: "The browser's storage is full: this conversation will be gone when the page closes. Delete others.",
    system: "System prompt",
    systemHint: "none",
    temperature: "Temperature",
    themeAuto: "Colours: as the system",
    themeDark: "Colours: dark",
    themeLight: "Colours: light",
    thinking: "Thinking …",
    thought: "Thought",
    toEnd: "To the end",
    tokens: (number) => count(number, "token"),
    toolCall: (name) => `Calls ${name}`,
    topP: "Top p",
    undo: "Undo",
    unreachable: "The server cannot be reached.",
    welcome: "What shall we talk about?",
    you: "You",
    keySend: "send",
    keyLine: "new line",
    keyStop: "stop the answer",
    keyEdit: "in an empty box: edit the last message",
    keyNew: "new conversation",
    keyAgain: "answer again",
    keyOther: "conversation above, below",
    keyMessage: "write",
    keyHelp: "this list",
  },
  zh: {
    again: "重新回答",
    alone: "每条消息单独发送，不带之前的对话",
    answering: "正在回答……",
    answerOf: (model) => `${model} 的回答`,
    answered: (number) => `已回答，${number} 个 token`,
    caution: "小模型会编造内容。对话只保存在此浏览器中。",
    close: "关闭",
    compare: "并排比较两个模型",
    connectionLost: "回答途中连接断开，已收到的内容已保留。",
    conversation: "对话",
    conversations: "对话列表",
    copied: "已复制",
    copy: "复制",
    copyCode: "复制代码",
    cut: "达到最大长度",
    delete: (title) => `删除“${title}”`,
    deleted: "对话已删除",
    edit: "编辑消息",
    editHint: "发送后将从这里重新提问，其后的内容会被替换。",
    cancel: "取消",
    first: (seconds) => `首个 token 用时 ${seconds.toFixed(2)} 秒`,
    key: "API 密钥",
    keyHint: "密钥只发送给本服务器，关闭标签页后即清除。",
    keyNeeded: "本服务器需要密钥。",
    keyWrong: "密钥未被接受。",
    language: "English",
    leftOut: (number) => `上下文已满：模型不再看到最早的 ${number} 轮对话。`,
    maxTokens: "最大回答长度（token）",
    message: "输入消息",
    model: "模型",
    modelA: "左侧模型",
    modelB: "右侧模型",
    about: (parameters, context) => `${large(parameters)} 参数 · 上下文 ${context} 个 token`,
    newConversation: "新对话",
    noModels: "本服务器没有可对话的模型。",
    notChat: "不能对话",
    refused: (message) => `服务器答复：${message}`,
    retry: "重试",
    save: "保存",
    seed: "随机种子",
    seedHint: "随机",
    send: "发送",
    serverLost: "无法连接服务器，您的消息已保留。",
    settings: "设置",
    settingsHint: "对本对话和新对话生效。",
    shortcuts: "键盘快捷键",
    speed: (rate) => `${rate >= 10 ? Math.round(rate) : rate.toFixed(1)} token/秒`,
    stop: "停止",
    stopped: "已停止",
    storageFull: "浏览器存储空间已满：关闭页面后本对话将丢失，请删除其他对话。",
    system: "系统提示词",
    systemHint: "无",
    temperature: "温度",
    themeAuto: "颜色：跟随系统",
    themeDark: "颜色：深色",
    themeLight: "颜色：浅色",
    thinking: "思考中……",
    thought: "思考过程",
    toEnd: "跳到末尾",
    tokens: (number) => `${number} 个 token`,
    toolCall: (name) => `调用 ${name}`,
    topP: "Top p",
    undo: "撤销",
    unreachable: "无法连接服务器。",
    welcome: "想聊点什么？",
    you: "您",
    keySend: "发送",
    keyLine: "换行",
    keyStop: "停止回答",
    keyEdit: "输入框为空时：编辑上一条消息",
    keyNew: "新对话",
    keyAgain: "重新回答",
    keyOther: "上一个、下一个对话",
    keyMessage: "开始输入",
    keyHelp: "显示此列表",
  },
};

let language = "en";

export function setLanguage(name) {
  language = name in WORDS ? name : "en";
}

export function say(name, ...values) {
  const word = WORDS[language][name];
  if (word === undefined) throw new Error(`words.js has no ${name} in ${language}`);
  return typeof word === "function" ? word(...values) : word;
}

/** Fill in the words of an element's parts (data-word, data-label, data-hint in index.html). */
export function fillWords(root) {
  for (const part of root.querySelectorAll("[data-word]")) part.textContent = say(part.dataset.word);
  for (const part of root.querySelectorAll("[data-hint]")) part.placeholder = say(part.dataset.hint);
  for (const part of root.querySelectorAll("[data-label]")) {
    part.ariaLabel = say(part.dataset.label);
    if (part.matches("button")) part.title = part.ariaLabel;
  }
}
