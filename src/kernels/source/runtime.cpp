#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include <oneapi/dnnl/dnnl_threadpool.h>

namespace acnet {
namespace {

// The thread pool as oneDNN calls it: threadpool_iface and the std::function of libstdc++, with which MindSpore's oneDNN was built.
// Spelled out, because a compiler with another standard library lays out its own std::function differently.
struct StdFunction {
    void *storage[2];
    void *manager;
    void (*invoke)(const StdFunction &, int &&, int &&);
};

class Pool {
public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        begun_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    void run(int64_t count, const std::function<void(int64_t)> &fn) {
        std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
        // Within a task, or while another thread of MindSpore computes: the same indices, one after the other.
        if (count <= 1 || threads_ == 1 || inside() || !turn.try_lock()) {
            for (int64_t i = 0; i < count; ++i) fn(i);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            fn_ = &fn, count_ = count, next_ = 0, ++round_;
        }
        begun_.notify_all();
        inside() = true;
        take(fn, count);
        inside() = false;
        // Not for workers that have yet to wake: on a busy machine that would cost more than it brings.
        std::unique_lock<std::mutex> lock(mutex_);
        fn_ = nullptr;
        finished_.wait(lock, [this] { return working_ == 0; });
    }

    static bool &inside() {
        static thread_local bool value = false;
        return value;
    }

private:
    void take(const std::function<void(int64_t)> &fn, int64_t count) {
        for (int64_t i = next_++; i < count; i = next_++) fn(i);
    }

    void work() {
        inside() = true;
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            begun_.wait(lock, [&] { return ends_ || (fn_ && round_ != seen); });
            if (ends_) return;
            seen = round_;
            ++working_;
            const auto &fn = *fn_;
            int64_t count = count_;
            lock.unlock();
            take(fn, count);
            lock.lock();
            if (--working_ == 0) finished_.notify_one();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex turn_, mutex_;
    std::condition_variable begun_, finished_;
    const std::function<void(int64_t)> *fn_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    int working_ = 0;
    uint64_t round_ = 0;
    bool ends_ = false;
};

struct Announcement {
    char layer[64];
    int64_t index;
    const void *data;
};

struct Board {
    std::mutex mutex;
    std::condition_variable changed;
    bool open = false;
    std::vector<Announcement> announcements;
};

Board &board() {
    static Board *const value = new Board;
    return *value;
}

struct State {
    std::mutex mutex;
    std::unique_ptr<Pool> pool{new Pool(1)};
    int isa = -1;
    std::string error;
};

State &state() {
    // Never destroyed: threads of MindSpore may still compute while the process ends.
    static State *const value = new State;
    return *value;
}

class PoolInterface {
public:
    virtual int get_num_threads() const { return state().pool->threads(); }
    virtual bool get_in_parallel() const { return Pool::inside(); }
    virtual void parallel_for(int count, const StdFunction &fn) {
        state().pool->run(count, [&](int64_t index) { fn.invoke(fn, static_cast<int>(index), static_cast<int>(count)); });
    }
    virtual uint64_t get_flags() const { return 0; }
    virtual void wait() {}
    virtual ~PoolInterface() = default;
};

dnnl::stream &stream() {
    static PoolInterface *const pool = new PoolInterface;
    static thread_local dnnl::stream value = [] {
        dnnl_stream_t made = nullptr;
        dnnl::error::wrap_c_api(dnnl_threadpool_interop_stream_create(&made, cpu().get(), pool), "no stream");
        return dnnl::stream(made);
    }();
    return value;
}

class Buffer {
public:
    ~Buffer() { std::free(data_); }
    void *of(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            size_t rounded = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, rounded);
            if (!data_) throw std::bad_alloc();
            size_ = rounded;
        }
        return data_;
    }

private:
    void *data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace

int64_t Arguments::size(int index) const {
    int64_t size = 1;
    for (int axis = 0; axis < ranks_[index]; ++axis) size *= shapes_[index][axis];
    return size;
}

Type Arguments::type(int index) const {
    if (!std::strcmp(types_[index], "float32")) return Type::f32;
    if (!std::strcmp(types_[index], "bfloat16")) return Type::bf16;
    throw std::runtime_error(std::string("no kernel for ") + types_[index]);
}

Activation::Activation(const Arguments &arguments, int index) : type(arguments.type(index)) {
    block = arguments.rank(index) == 5 ? arguments.dim(index, 4) : 1;
    n = arguments.dim(index, 0), c = arguments.dim(index, 1) * block, h = arguments.dim(index, 2), w = arguments.dim(index, 3);
}

void *scratch(Slot slot, size_t bytes) {
    static thread_local Buffer buffers[static_cast<int>(Slot::Count)];
    return buffers[static_cast<int>(slot)].of(bytes);
}

void parallel_for(int64_t count, const std::function<void(int64_t)> &fn) { state().pool->run(count, fn); }

const dnnl::engine &cpu() {
    static const dnnl::engine *const value = new dnnl::engine(dnnl::engine::kind::cpu, 0);
    return *value;
}

dnnl::primitive_attr attributes() {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    return attributes;
}

dnnl::memory::desc blocked(int64_t n, int64_t c, int64_t h, int64_t w, int64_t block, Type type) {
    using tag = dnnl::memory::format_tag;
    return {{n, c, h, w}, type, block == 16 ? tag::nChw16c : block == 8 ? tag::nChw8c : tag::nchw};
}

dnnl::memory view(const dnnl::memory::desc &desc, const void *data) { return {desc, cpu(), const_cast<void *>(data)}; }

void execute(const dnnl::primitive &primitive, const dnnl::memory::desc &scratchpad, std::unordered_map<int, dnnl::memory> arguments) {
    arguments[DNNL_ARG_SCRATCHPAD] = view(scratchpad, scratch(Slot::Primitive, scratchpad.get_size()));
    primitive.execute(stream(), arguments);
}

void reorder(const dnnl::memory::desc &from, const void *source, const dnnl::memory::desc &to, void *target) {
    dnnl::reorder::primitive_desc described(cpu(), from, cpu(), to, attributes());
    execute(dnnl::reorder(described), described.scratchpad_desc(),
            {{DNNL_ARG_FROM, view(from, source)}, {DNNL_ARG_TO, view(to, target)}});
}

bool is_reference(const char *implementation) {
    std::string name(implementation);
    return name.find("ref") == 0 || name.find("simple") == 0 || name.find("gemm:ref") != std::string::npos;
}

void announce(const Arguments &arguments, int index) {
    std::lock_guard<std::mutex> lock(board().mutex);
    if (!board().open) return;
    Announcement made{{}, index, arguments.data<void>(index)};
    std::strncpy(made.layer, arguments.layer().c_str(), sizeof made.layer - 1);
    board().announcements.push_back(made);
    board().changed.notify_all();
}

int guarded(const std::string &what, const std::function<void()> &body) {
    std::string reason;
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        reason = "out of memory";
    } catch (const std::exception &failure) {
        reason = failure.what();
    }
    std::lock_guard<std::mutex> lock(state().mutex);
    state().error = what + ": " + reason;
    return 1;
}

}  // namespace acnet

// Before the first kernel: the number of threads, and the most of the processor's instructions to use, 0 for all. Later calls may change the
// number of threads, while no kernel runs.
extern "C" int acnet_configure(int threads, int isa) {
    auto &state = acnet::state();
    return acnet::guarded("configure", [&] {
        if (state.isa < 0) dnnl::set_max_cpu_isa(static_cast<dnnl::cpu_isa>(isa));
        else if (state.isa != isa) throw std::runtime_error("the instructions to use cannot change");
        state.isa = isa;
        if (state.pool->threads() != threads) state.pool.reset(new acnet::Pool(threads));
    });
}

// Forgets what was announced; from now on kernels announce, or they do not.
extern "C" void acnet_announce(int open) {
    auto &board = acnet::board();
    std::lock_guard<std::mutex> lock(board.mutex);
    board.open = open, board.announcements.clear();
}

// Copies what was announced beyond the first `seen`, at most `most`, waiting up to `seconds` for something; returns how many.
extern "C" int acnet_announced(int seen, int most, double seconds, acnet::Announcement *to) {
    auto &board = acnet::board();
    std::unique_lock<std::mutex> lock(board.mutex);
    board.changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return static_cast<int>(board.announcements.size()) > seen; });
    int count = std::min(std::max(static_cast<int>(board.announcements.size()) - seen, 0), most);
    std::copy_n(board.announcements.begin() + std::min<size_t>(seen, board.announcements.size()), count, to);
    return count;
}

extern "C" int acnet_isa() { return static_cast<int>(dnnl::get_effective_cpu_isa()); }

extern "C" const char *acnet_last_error() {
    static thread_local std::string copy;
    std::lock_guard<std::mutex> lock(acnet::state().mutex);
    copy = acnet::state().error;
    return copy.c_str();
}
