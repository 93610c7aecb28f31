#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace acnet {
namespace {

thread_local bool inside = false;

// Sets `inside` for the current scope, also if that is left by an exception.
struct Inside {
    Inside() { inside = true; }
    ~Inside() { inside = false; }
};

class ThreadPool {
public:
    explicit ThreadPool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~ThreadPool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    void run(int64_t count, const std::function<void(int64_t)> &fn) {
        std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
        // Inside a task, or while another thread of MindSpore uses the pool: compute serially.
        if (count <= 1 || threads_ == 1 || inside || !turn.try_lock()) {
            for (int64_t i = 0; i < count; ++i) fn(i);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            fn_ = &fn, count_ = count, next_ = 0, failure_ = nullptr, ++round_;
        }
        wake_.notify_all();
        {
            Inside mark;
            take(fn, count);
        }
        // Wait for the workers that joined in, not for those that have not woken up yet: on a busy
        // machine that would cost more than it gains.
        std::unique_lock<std::mutex> lock(mutex_);
        fn_ = nullptr;
        done_.wait(lock, [this] { return working_ == 0; });
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

private:
    void take(const std::function<void(int64_t)> &fn, int64_t count) noexcept {
        try {
            for (int64_t i = next_++; i < count; i = next_++) fn(i);
        } catch (...) {
            next_ = count;  // the other threads stop at their next index
            std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void work() {
        Inside mark;
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stopping_ || (fn_ && round_ != seen); });
            if (stopping_) return;
            seen = round_;
            ++working_;
            const auto &fn = *fn_;
            int64_t count = count_;
            lock.unlock();
            take(fn, count);
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t)> *fn_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    std::exception_ptr failure_;
    int working_ = 0;
    uint64_t round_ = 0;
    bool stopping_ = false;
};

struct CurrentPool {
    std::mutex mutex;
    std::shared_ptr<ThreadPool> pool = std::make_shared<ThreadPool>(1);
};

CurrentPool &current() {
    // Never destroyed: threads of MindSpore may still compute while the process ends.
    static CurrentPool *const value = new CurrentPool;
    return *value;
}

std::shared_ptr<ThreadPool> pool() {
    std::lock_guard<std::mutex> lock(current().mutex);
    return current().pool;
}

}  // namespace

void parallel_for(int64_t count, const std::function<void(int64_t)> &fn) { pool()->run(count, fn); }

int num_threads() { return pool()->threads(); }

void set_num_threads(int threads) {
    if (threads == num_threads()) return;
    auto replacement = std::make_shared<ThreadPool>(threads);
    std::lock_guard<std::mutex> lock(current().mutex);
    current().pool.swap(replacement);
}

bool in_parallel() { return inside; }

}  // namespace acnet
