// What csrc/cuda/grid.h takes from nvcc, for a plain C++ compiler: the threads of the blocks of one group as coroutines on one processor.
//
// A thread runs until it waits: at a barrier of its block, in a shuffle of its warp, or for a word that another block changes. Then another
// one runs, in an order that the test chooses, so that what lies between two barriers is run in any order, some warps as far ahead of
// others as barriers let them: one that is missing shows as a wrong result. Shared memory begins as rubbish. When every thread waits, the
// kernel would hang: that is an error. It cannot show what only hardware has: memory that other processors see late, and speed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

namespace emulated {

struct Barrier {
    uint32_t arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier;
    uint64_t value[2][32];  // of the shuffle going on and of the one before, which some have yet to read
};

struct Block {
    int index = 0;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
};

struct Thread {
    ucontext_t start;
    jmp_buf here;
    bool started = false, done = false;
    const uint32_t* waits_for = nullptr;  // until it is something else than `waits_while`
    uint32_t waits_while = 0;
    int index = 0;
    Block* block = nullptr;
};

class Grid {
  public:
    enum Order { kForward, kBackward, kShuffled };

    Grid(int threads, size_t shared_bytes) : threads_(threads), shared_bytes_(shared_bytes) {}
    ~Grid() {
        if (stacks_ != nullptr) munmap(stacks_, stack_bytes_);
    }
    Grid(const Grid&) = delete;
    Grid& operator=(const Grid&) = delete;

    // Run blocks first .. first + count - 1, all at the same time. `body` takes the block's shared memory.
    void run(int first, int count, Order order, uint32_t seed, const std::function<void(unsigned char*)>& body) {
        const size_t total = static_cast<size_t>(threads_) * static_cast<size_t>(count);
        reserve(total);
        blocks_.assign(static_cast<size_t>(count), Block{});
        threads_of_all_.assign(total, Thread{});
        body_ = &body;
        for (size_t t = 0; t < total; ++t) {
            Block& block = blocks_[t / static_cast<size_t>(threads_)];
            Thread& thread = threads_of_all_[t];
            thread.block = &block;
            thread.index = static_cast<int>(t % static_cast<size_t>(threads_));
            if (thread.index == 0) {
                block.index = first + static_cast<int>(&block - blocks_.data());
                block.warps.resize(static_cast<size_t>(threads_) / 32);
                block.shared.assign(shared_bytes_ + 16, 0xA5);
            }
            prepare(thread, stacks_ + t * kStack);
        }
        std::vector<size_t> turns(total);
        for (size_t t = 0; t < total; ++t) turns[t] = order == kBackward ? total - 1 - t : t;
        std::vector<bool> starved(total / 32);  // warps that do not get on before all others wait
        bool any_starved = false;
        const auto random = [&seed](size_t below) {
            seed = seed * 1664525u + 1013904223u;
            return static_cast<size_t>(seed >> 8) % below;
        };
        for (size_t left = total; left > 0;) {
            if (order == kShuffled)
                for (size_t t = total - 1; t > 0; --t) std::swap(turns[t], turns[random(t + 1)]);
            bool any = false;
            for (const size_t t : turns) {
                Thread& thread = threads_of_all_[t];
                if (thread.done || starved[t / 32] || (thread.waits_for != nullptr && *thread.waits_for == thread.waits_while)) continue;
                any = true;
                resume(thread);
                left -= thread.done;
            }
            if (!any && !any_starved) throw std::runtime_error("every thread waits");
            if (order != kShuffled || (any && any_starved)) continue;
            // Those that were starved get on now; then others are.
            any_starved = !any_starved;
            const size_t kind = random(3), chosen = random(starved.size());  // half of them, one, or all but one
            for (size_t w = 0; w < starved.size(); ++w)
                starved[w] = any_starved && (kind == 0 ? random(2) == 0 : (w == chosen) == (kind == 1));
        }
    }

    static Grid*& current() {
        static Grid* grid = nullptr;
        return grid;
    }
    Thread& thread() { return *running_; }
    int block_size() const { return threads_; }

    void wait_while(const uint32_t* at, uint32_t x) {
        while (*at == x) {
            running_->waits_for = at;
            running_->waits_while = x;
            leave(*running_);
        }
        running_->waits_for = nullptr;
    }
    void pass(Barrier& barrier, uint32_t count) {
        const uint32_t generation = barrier.generation;
        if (++barrier.arrived == count) {
            barrier.arrived = 0;
            ++barrier.generation;
        } else {
            wait_while(&barrier.generation, generation);
        }
    }

  private:
    static constexpr size_t kStack = 32 << 10;

    static void enter() {
        Grid& grid = *current();
        Block& block = *grid.running_->block;
        (*grid.body_)(block.shared.data() + (16 - reinterpret_cast<uintptr_t>(block.shared.data()) % 16) % 16);
        grid.running_->done = true;
        _longjmp(grid.back_, 1);
    }
    // Functions of their own: no variable of the kernel, or of `run`, is alive in them.
    [[gnu::noinline]] static void prepare(Thread& thread, unsigned char* stack) {
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = stack;
        thread.start.uc_stack.ss_size = kStack;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, &Grid::enter, 0);
    }
    [[gnu::noinline]] void leave(Thread& thread) {
        if (_setjmp(thread.here) == 0) _longjmp(back_, 1);
    }
    [[gnu::noinline]] void resume(Thread& thread) {
        running_ = &thread;
        current() = this;
        if (_setjmp(back_) != 0) return;
        if (thread.started) _longjmp(thread.here, 1);
        thread.started = true;
        setcontext(&thread.start);
    }
    void reserve(size_t total) {
        if (total * kStack <= stack_bytes_) return;
        if (stacks_ != nullptr) munmap(stacks_, stack_bytes_);
        stack_bytes_ = total * kStack;
        void* at = mmap(nullptr, stack_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
        stacks_ = static_cast<unsigned char*>(at);
    }

    int threads_;
    size_t shared_bytes_, stack_bytes_ = 0;
    unsigned char* stacks_ = nullptr;
    std::vector<Block> blocks_;
    std::vector<Thread> threads_of_all_;
    const std::function<void(unsigned char*)>* body_ = nullptr;
    Thread* running_ = nullptr;
    jmp_buf back_;
};

}  // namespace emulated

namespace engine::cuda {

using emulated::Grid;

ENGINE_DEVICE int thread_index() { return Grid::current()->thread().index; }
ENGINE_DEVICE int block_index() { return Grid::current()->thread().block->index; }
ENGINE_DEVICE void block_barrier() {
    Grid& grid = *Grid::current();
    grid.pass(grid.thread().block->barrier, static_cast<uint32_t>(grid.block_size()));
}
ENGINE_DEVICE uint64_t exchange(uint64_t x, int from) {
    Grid& grid = *Grid::current();
    emulated::Thread& thread = grid.thread();
    emulated::Warp& warp = thread.block->warps[static_cast<size_t>(thread.index / kWarp)];
    uint64_t* values = warp.value[warp.barrier.generation % 2];
    values[thread.index % kWarp] = x;
    grid.pass(warp.barrier, kWarp);
    return values[from];
}
ENGINE_DEVICE uint32_t shuffle_xor(uint32_t x, int lanes) { return static_cast<uint32_t>(exchange(x, (thread_index() % kWarp) ^ lanes)); }
ENGINE_DEVICE uint64_t shuffle_xor(uint64_t x, int lanes) { return exchange(x, (thread_index() % kWarp) ^ lanes); }
ENGINE_DEVICE uint64_t shuffle_up(uint64_t x, int lanes) {
    const int lane = thread_index() % kWarp;
    return exchange(x, lane >= lanes ? lane - lanes : lane);
}

ENGINE_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t x) {
    const uint32_t before = *at;
    *at += x;
    return before;
}
ENGINE_DEVICE void atomic_add(uint64_t* at, uint64_t x) { *at += x; }
ENGINE_DEVICE void atomic_max(uint32_t* at, uint32_t x) { *at = *at > x ? *at : x; }
ENGINE_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t x) {
    const uint32_t before = *at;
    *at |= x;
    return before;
}
ENGINE_DEVICE uint32_t load_shared_by_blocks(const uint32_t* at) { return *at; }
ENGINE_DEVICE uint64_t load_shared_by_blocks(const uint64_t* at) { return *at; }
ENGINE_DEVICE void fence() {}
ENGINE_DEVICE uint32_t load_volatile(const uint32_t* at) { return *at; }
ENGINE_DEVICE void wait_while(const uint32_t* at, uint32_t x) { Grid::current()->wait_while(at, x); }

ENGINE_DEVICE float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x = exponent == 31
                  ? (mantissa != 0 ? NAN : INFINITY)
                  : std::ldexp(static_cast<float>(exponent != 0 ? mantissa + 1024 : mantissa), (exponent != 0 ? exponent : 1) - 25);
    return bits >> 15 != 0 ? -x : x;
}

}  // namespace engine::cuda
