#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace engine {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);  // a decode step leaves gaps of tens of microseconds between kernels

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// CPUs' worth of time that the control group grants (a container's limit), or 0 where there is no such limit.
int quota_cpus() {
    long long quota = 0, period = 0;
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        if (std::fscanf(file, "%lld %lld", &quota, &period) != 2) quota = 0;  // "max": none
        std::fclose(file);
    }
    return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

// A whole number from the environment, or `missing` where the variable is unset or empty. Throws std::invalid_argument for anything else.
int from_environment(const char* name, int low, int high, int missing) {
    const char* text = std::getenv(name);
    if (text == nullptr || *text == '\0') return missing;
    char* end = nullptr;
    errno = 0;
    const long n = std::strtol(text, &end, 10);
    if (*end != '\0' || errno != 0 || n < low || n > high)
        throw std::invalid_argument(std::string(name) + " is '" + text + "'; it must be a whole number from " + std::to_string(low) +
                                    " to " + std::to_string(high));
    return static_cast<int>(n);
}

// The CPUs that this thread may run on, in order; none where the system does not tell.
std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
    return cpus;
}

void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);  // where it fails, the thread runs unpinned
#else
    static_cast<void>(thread), static_cast<void>(cpu);
#endif
}

int default_threads() {
    const int allowed = static_cast<int>(allowed_cpus().size());
    int cpus = allowed > 0 ? allowed : static_cast<int>(std::thread::hardware_concurrency());
    const int quota = quota_cpus();
    if (quota > 0 && quota < cpus) cpus = quota;
    return from_environment("ENGINE_NUM_THREADS", 1, kMaxThreads, std::min(std::max(cpus, 1), kMaxThreads));
}

thread_local bool inside = false;  // this thread is running chunks: a nested parallel_for runs inline

// A job is open for helpers while `state` carries kOpen; a helper enters by counting itself into the low bits and leaves by counting itself
// out. The caller closes the job when no chunk is left and waits only for those that entered, so that a job smaller than the time it takes
// to wake a sleeping worker never waits for it.
class Pool {
  public:
    Pool(int threads, bool pinned) : size_(threads), pinned_(pinned) {
        const std::vector<int> cpus = pinned ? allowed_cpus() : std::vector<int>();
        for (int i = 1; i < threads; ++i) {
            workers_.emplace_back([this] { work(); });
            if (!cpus.empty()) pin(workers_.back(), cpus[static_cast<size_t>(i) % cpus.size()]);
        }
    }

    ~Pool() {
        stop_.store(true);
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        for (std::thread& worker : workers_) worker.join();
    }

    int size() const { return size_; }
    bool pinned() const { return pinned_; }

    void run(int64_t n, int64_t grain, RangeFn fn, void* context) {
        n_ = n;
        grain_ = grain;
        fn_ = fn;
        context_ = context;
        next_.store(0, std::memory_order_relaxed);
        // A new epoch, open. Sequentially consistent, as is sleepers_: either we see the sleeper or it sees the job.
        state_.fetch_add(kEpoch + kOpen);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        chunks();
        state_.fetch_and(~kOpen, std::memory_order_acq_rel);
        for (int spins = 0; state_.load(std::memory_order_acquire) % kOpen != 0; ++spins) {
            pause();
            if (spins > 20000) std::this_thread::yield();  // fewer CPUs than threads: let the helper run
        }
    }

  private:
    static constexpr uint64_t kOpen = uint64_t{1} << 16;
    static constexpr uint64_t kEpoch = uint64_t{1} << 17;

    void chunks() {
        inside = true;
        while (true) {
            const int64_t begin = next_.fetch_add(1, std::memory_order_relaxed) * grain_;
            if (begin >= n_) break;
            fn_(context_, begin, n_ - begin < grain_ ? n_ : begin + grain_);
        }
        inside = false;
    }

    // Count this helper in. True if a job is open, whose epoch `seen` becomes; otherwise it is counted out again. One addition and no loop:
    // dozens of helpers enter at the same time.
    bool enter(uint64_t* seen) {
        const uint64_t state = state_.fetch_add(1, std::memory_order_acq_rel);
        if ((state & kOpen) != 0) {
            *seen = state / kEpoch;
            return true;
        }
        leave();
        return false;
    }

    void leave() { state_.fetch_sub(1, std::memory_order_acq_rel); }

    void work() {
#if defined(__x86_64__)
        __builtin_ia32_ldmxcsr(kDefaultControl);  // not what the thread that started this one has set
#endif
        uint64_t seen = state_.load() / kEpoch;
        if ((state_.load() & kOpen) != 0) --seen;  // started while a job is open: join it
        while (true) {
            const auto deadline = std::chrono::steady_clock::now() + kSpin;
            uint64_t epoch = seen;
            for (int spins = 0; !stop_.load(std::memory_order_relaxed); ++spins) {
                epoch = state_.load(std::memory_order_acquire) / kEpoch;
                if (epoch != seen) break;
                pause();
                if (spins % 64 == 63 && std::chrono::steady_clock::now() > deadline) {
                    std::unique_lock<std::mutex> lock(sleep_mutex_);
                    sleepers_.fetch_add(1);
                    wake_.wait(lock, [&] { return stop_.load() || state_.load() / kEpoch != seen; });
                    sleepers_.fetch_sub(1);
                }
            }
            if (stop_.load()) return;
            seen = epoch;
            if (enter(&seen)) {
                chunks();
                leave();
            }
        }
    }

    const int size_;
    const bool pinned_;
    int64_t n_ = 0, grain_ = 1;
    RangeFn fn_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

// Guards pool, and is held for the length of a parallel_for. Never destroyed: worker threads may outlive static destructors.
std::mutex& turn() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
}
Pool* pool = nullptr;
std::atomic<int> wanted{0};       // 0: not asked for yet
std::atomic<int> wanted_pin{-1};  // likewise -1

// A fork copies only the forking thread: wait until no job runs, and in the child forget the pool (its threads do not exist there; joining
// or freeing it would hang, so its memory is given up) and start a new one on demand.
void before_fork() {
    if (!inside) turn().lock();
}
void after_fork_in_parent() {
    if (!inside) turn().unlock();
}
void after_fork_in_child() {
    pool = nullptr;
    if (!inside) turn().unlock();
}

[[maybe_unused]] const int registered = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);

int wanted_threads() {
    int n = wanted.load(std::memory_order_relaxed);
    if (n == 0) {
        int none = 0;
        n = default_threads();
        if (!wanted.compare_exchange_strong(none, n)) n = none;
    }
    return n;
}

bool wanted_pinned() {
    int pin = wanted_pin.load(std::memory_order_relaxed);
    if (pin < 0) wanted_pin.store(pin = from_environment("ENGINE_PIN_THREADS", 0, 1, 0));
    return pin != 0;
}

struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

int num_threads() { return wanted_threads(); }

bool threads_pinned() { return wanted_pinned(); }

void set_num_threads(int n, bool pin) {
    std::lock_guard<std::mutex> lock(turn());
    wanted.store(n);
    wanted_pin.store(pin);
    if (pool != nullptr && (pool->size() != n || pool->pinned() != pin)) {
        delete pool;
        pool = nullptr;
    }
}

void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* context) {
    if (grain < 1) grain = 1;
    if (inside || n <= grain) {
        for (int64_t begin = 0; begin < n; begin += grain) fn(context, begin, n - begin < grain ? n : begin + grain);
        return;
    }
    std::lock_guard<std::mutex> lock(turn());
    if (pool == nullptr) pool = new Pool(wanted_threads(), wanted_pinned());
    pool->run(n, grain, fn, context);
}

constexpr int64_t kHugePage = 2 << 20;

void* scratch(ScratchSlot slot, int64_t bytes) {
    static thread_local Buffer buffers[kNumScratchSlots];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.bytes = 0;
        const int64_t page = bytes < kHugePage ? 4096 : kHugePage;
        bytes = (bytes + bytes / 2 + page - 1) / page * page;
        buffer.data = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(bytes));
        if (buffer.data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page == kHugePage) madvise(buffer.data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish
#endif
        buffer.bytes = bytes;
    }
    return buffer.data;
}

}  // namespace engine
