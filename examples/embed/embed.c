/* embed.c: the smallest app that generates text, from copies of bnb.h, bnb.c and models/ beside it.
 *
 * Build: cc -O2 -I. -c bnb.c embed.c && c++ -std=c++17 -O2 -o embed embed.o bnb.o \
 *            models/model.cpp models/gpt2.cpp models/opt.cpp models/tokenizer.cpp models/sampler.cpp -pthread
 * Use:   ./embed model.bnb "Once upon a time"
 * Not:   reads .bnb files only: no other library is needed. */
#include <stdio.h>
#include <string.h>

#include "models/model.h"

static int32_t on_text(void *user, const char *utf8, size_t bytes) {
    (void)user;
    return fwrite(utf8, 1, bytes, stdout) == bytes && fflush(stdout) == 0; /* 0 stops generation */
}

static int fail(const bnb_error *err) {
    fprintf(stderr, "embed: %s\n", err->msg);
    return 1;
}

static int generate(bnb_model *model, bnb_session *session, const char *prompt) {
    bnb_error err;
    int32_t tokens[1024];
    const int64_t n = bnb_tokenize(model, prompt, strlen(prompt), BNB_TOKENIZE_SPECIAL, tokens, 1024, &err);
    if (n < 0) return fail(&err);
    if (n == 0 || n > 1024) return fprintf(stderr, "embed: the prompt is empty or too long\n"), 1;

    bnb_generate_params params;
    bnb_generate_params_default(&params, sizeof params);
    params.n_predict = 64;
    params.sampling.temp = 0; /* always the likeliest token */
    params.on_text = on_text;
    bnb_generate_result result;
    if (bnb_generate(session, tokens, n, &params, &result, &err) < 0) return fail(&err);
    return printf("\n") < 0;
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: embed MODEL.bnb PROMPT\n"), 2;
    bnb_error err;
    int status = 1;
    bnb_model *model = NULL;
    bnb_session *session = NULL;
    bnb_env *env = bnb_env_create(NULL, &err);
    if (!env || !(model = bnb_model_open(env, argv[1], NULL, &err)) || !(session = bnb_session_create(model, 0, &err)))
        fail(&err);
    else
        status = generate(model, session, argv[2]);
    bnb_session_free(session);
    bnb_model_free(model);
    bnb_env_free(env);
    return status;
}
