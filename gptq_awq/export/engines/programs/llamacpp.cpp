// Compute logits with llama.cpp from a GGUF file, at every position of every window.
//
//     llama-logits MODEL.gguf TOKENS LOGITS WINDOWS SEQLEN
//
// TOKENS is WINDOWS x SEQLEN int32, LOGITS becomes WINDOWS x SEQLEN x vocabulary float32, both without a header.
// llama.cpp's own CPU kernels round activations to 8 bits, which would hide small errors in the file. Its BLAS backend,
// used for batches of at least 32 tokens, expands weights to float32 and calls sgemm; it requires weights in plain
// buffers. Keys and values are kept in float32 too. Windows of fewer than 32 tokens are an error.

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <thread>
#include <vector>

constexpr int shortest_batch_for_blas = 32;

[[noreturn]] static void fail(const char * message) {
    std::fprintf(stderr, "RuntimeError: %s\n", message);
    std::exit(1);
}

static void only_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

static llama_model * load(const char * path) {
    auto params = llama_model_default_params();
    params.use_extra_bufts = false;  // BLAS can't use repacked weights
    return llama_model_load_from_file(path, params);
}

static int threads() {
    const char * asked = std::getenv("OMP_NUM_THREADS");
    const int n = asked ? std::atoi(asked) : int(std::thread::hardware_concurrency());
    return n > 0 ? n : 1;
}

static llama_context * make_context(llama_model * model, int seqlen) {
    auto params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = seqlen;
    params.n_seq_max = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;  // flash attention computes in float16
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.n_threads = params.n_threads_batch = threads();
    return llama_init_from_model(model, params);
}

static void run_window(llama_context * ctx, const int32_t * tokens, int seqlen) {
    llama_memory_clear(llama_get_memory(ctx), true);
    auto batch = llama_batch_init(seqlen, 0, 1);
    batch.n_tokens = seqlen;
    for (int i = 0; i < seqlen; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    const bool failed = llama_decode(ctx, batch) != 0;
    llama_batch_free(batch);
    if (failed) fail("llama.cpp could not evaluate the tokens");
}

int main(int argc, char ** argv) {
    if (argc != 6) fail("usage: llama-logits MODEL.gguf TOKENS LOGITS WINDOWS SEQLEN");
    const int windows = std::atoi(argv[4]), seqlen = std::atoi(argv[5]);
    if (seqlen < shortest_batch_for_blas) fail("windows of fewer than 32 tokens don't reach BLAS");

    std::vector<int32_t> tokens(size_t(windows) * seqlen);
    std::ifstream in(argv[2], std::ios::binary);
    if (!in.read(reinterpret_cast<char *>(tokens.data()), tokens.size() * sizeof(int32_t))) fail("too few tokens");

    llama_log_set(only_errors, nullptr);
    llama_backend_init();
    auto * model = load(argv[1]);
    if (!model) fail("llama.cpp could not load the model");
    auto * ctx = make_context(model, seqlen);
    if (!ctx) fail("llama.cpp could not make a context");

    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::ofstream out(argv[3], std::ios::binary);
    for (int w = 0; w < windows; w++) {
        run_window(ctx, tokens.data() + size_t(w) * seqlen, seqlen);
        for (int i = 0; i < seqlen; i++)
            out.write(reinterpret_cast<const char *>(llama_get_logits_ith(ctx, i)), vocab * sizeof(float));
    }
    if (!out.flush()) fail("cannot write the logits");
    llama_free(ctx);
    llama_model_free(model);
}
