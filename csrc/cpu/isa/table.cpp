// The table of this instruction set. Each family declares its functions here and names them below.
#include "../kernels.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {

void linear(const LinearArgs& args);      // linear.cpp
void linear_int(const LinearArgs& args);  // linear_int.cpp
void embed(const int32_t* tokens, int64_t count, const LinearSegment& table, WeightFormat format, int64_t k, float* out);

float read_floats(const float* data, int64_t count);  // limits.cpp
int64_t multiply_adds(int64_t tasks, int64_t rounds);
void attention_item(const AttentionArgs& args, const AttentionItem& item);   // attention.cpp
void attention_merge(const AttentionArgs& args, const AttentionItem& item);  // attention.cpp

void sample(const SampleArgs& args);                   // sample.cpp
void beam_select(const BeamArgs& args);                // beam.cpp
void masses(const SampleArgs& args, int64_t* masses);  // masses.cpp
void verify_block(const VerifyBlockArgs& args);        // verify.cpp
void noise_of_row(int64_t seed, int32_t position, int32_t stream, int64_t vocab, uint32_t* words, uint32_t* lows);
void noise_of_words(const uint32_t* words, const uint32_t* lows, int64_t n, float* exponential, float* log_exponential);
void weights_of_values(const float* values, int64_t n, int64_t* weights);

void rms_norm(const float* x, int64_t rows, int64_t width, const void* weight, DType dtype, float eps, float* out);  // elementwise.cpp
void silu_mul(const float* x, int64_t rows, int64_t width, float* out);
void rope_append(const RopeArgs& args);

const Kernels& kernels() {
    // Assigned one by one, not brace-initialised: families add theirs without depending on the order of the struct's members.
    static const Kernels table = [] {
        Kernels k{};
        k.linear = linear;
        k.linear_int = linear_int;
        k.read_floats = read_floats;
        k.multiply_adds = multiply_adds;
        k.attention_item = attention_item;
        k.attention_merge = attention_merge;
        k.sample = sample;
        k.beam_select = beam_select;
        k.masses = masses;
        k.verify_block = verify_block;
        k.noise_of_row = noise_of_row;
        k.noise_of_words = noise_of_words;
        k.weights_of_values = weights_of_values;
        k.embed = embed;
        k.rms_norm = rms_norm;
        k.silu_mul = silu_mul;
        k.rope_append = rope_append;
        return k;
    }();
    return table;
}

}  // namespace ENGINE_ISA
}  // namespace engine
