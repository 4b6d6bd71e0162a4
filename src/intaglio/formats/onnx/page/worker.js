// The model, away from the page so that this stays responsive. Messages in: { id, kind, ... }; out: { id, progress },
// and at last { id, result } or { id, error }.

let tokenizer, model, library, stop;

const kinds = {
  // device: "wasm" or "webgpu"; each has a build of ONNX Runtime of its own, since that for WebGPU lacks kernels for the CPU.
  async load({ device, threads, bytes, stopFlag }, say) {
    library = await import(`./vendor/transformers.${device}.js`);
    const { env, AutoTokenizer, AutoModelForCausalLM } = library;
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = new URL("./", import.meta.url).pathname;
    env.useBrowserCache = false; // a model that was exported again would not be seen
    const wasm = device === "webgpu" ? "ort-wasm-simd-threaded.asyncify.wasm" : "ort-wasm-simd-threaded.wasm";
    env.backends.onnx.wasm.wasmPaths = { wasm: new URL(`./vendor/${wasm}`, import.meta.url).href };
    env.backends.onnx.wasm.numThreads = threads;
    // Asked after each token. A message could not get in between, as the worker is busy: the page sets shared memory.
    stop = new library.InterruptableStoppingCriteria();
    Object.defineProperty(stop, "interrupted", { get: () => Atomics.load(stopFlag, 0) === 1 });
    const loaded = new Map();
    const progress_callback = ({ status, file, loaded: done }) => {
      if (status !== "progress") return;
      loaded.set(file, done);
      const sum = [...loaded.values()].reduce((a, b) => a + b, 0);
      say({ share: Math.min(1, sum / bytes), text: `Loading ${(sum / 1e6).toFixed(0)} of ${(bytes / 1e6).toFixed(0)} MB` });
    };
    tokenizer = await AutoTokenizer.from_pretrained("model", { progress_callback });
    model = await AutoModelForCausalLM.from_pretrained("model", { dtype: "q4", device, progress_callback });
    say({ share: 1, text: "Warming up" });
    await kinds.greedy({ ids: [model.config.text_config.bos_token_id ?? 2], tokens: 2 });
  },

  // A conversation's next turn, as text and number of tokens while it is written.
  async chat({ messages, sampling, longest }, say) {
    const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
    let tokens = 0;
    const streamer = new library.TextStreamer(tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      token_callback_function: () => void tokens++,
      callback_function: (text) => {
        say({ text, tokens });
        tokens = 0;
      },
    });
    const how = sampling ? { do_sample: true, ...sampling } : { do_sample: false };
    await model.generate({ ...inputs, ...how, max_new_tokens: longest, streamer, stopping_criteria: stop });
    if (tokens) say({ text: "", tokens });
  },

  // The likeliest continuation of a prompt's ids, past any end-of-text token.
  async greedy({ ids, tokens }) {
    const how = { do_sample: false, eos_token_id: -1, max_new_tokens: tokens };
    const made = await model.generate({ ...asInputs(ids), ...how });
    return Array.from(made.data.slice(ids.length), Number);
  },

  // float32 logits [T, V] of one window, row after row.
  async logits({ ids }) {
    const { logits } = await model(asInputs(ids));
    return new Float32Array(logits.data);
  },
};

const int64 = (values) => new library.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

const asInputs = (ids) => ({ input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) });

self.onmessage = async ({ data: { id, kind, ...body } }) => {
  try {
    const result = await kinds[kind](body, (progress) => postMessage({ id, progress }));
    postMessage({ id, result });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
