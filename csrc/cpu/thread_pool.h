// The one thread pool of the process. Header free of std:: templates: the isa/ files, compiled with wide flags, include it.
#pragma once

#include <cstdint>

namespace engine {

#if defined(__x86_64__)
constexpr unsigned kDefaultControl = 0x1f80;  // of MXCSR: round to nearest even, exceptions masked, subnormal numbers as they are
#endif

constexpr int kMaxThreads = 1024;  // more than any machine this runs on has, fewer than the system refuses

// Threads that take part in a parallel_for, the caller included. Default: ENGINE_NUM_THREADS, else the CPUs this process may run on (its
// affinity mask, and its control group's quota if that is less).
int num_threads();

// Whether each of them but the caller stays on one CPU: helper i on the i-th that the process may run on. Default: ENGINE_PIN_THREADS, else
// not. Both throw std::invalid_argument when their variable holds no such number.
bool threads_pinned();

void set_num_threads(int n, bool pin);  // 1 <= n <= kMaxThreads; waits for a running parallel_for to end

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Call fn on [0, n) cut into chunks [i * grain, min(n, (i + 1) * grain)), handed out to the threads as they become free; returns when all
// are done. fn never gets more than `grain` items (so scratch may be sized by it) and must not throw. Which thread runs a chunk is not
// fixed: nothing in a result may depend on it. Nested calls run inline; calls from several threads take turns.
void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* context);

// The same for a callable f(begin, end).
template <class F>
static inline void parallel_for(int64_t n, int64_t grain, const F& f) {
    parallel_for(
        n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

// A growable 64-byte aligned buffer of the calling thread, kept between calls; its contents last until the thread asks for the same slot
// again. kCallScratch is meant for what the caller prepares before a parallel_for and all threads read, kThreadScratch for what each thread
// uses inside, kStepScratch for what lasts from kernel to kernel of a step. Throws std::bad_alloc; the pointer is valid until a larger size
// is asked for.
enum ScratchSlot { kCallScratch = 0, kThreadScratch = 1, kStepScratch = 2, kNumScratchSlots = 3 };
void* scratch(ScratchSlot slot, int64_t bytes);

}  // namespace engine
