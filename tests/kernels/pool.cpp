// Exceptions and changes of the number of threads, for test_arguments.py and sanitize.sh.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include "thread_pool.h"
int main() {
    acnet::set_num_threads(4);
    for (int round = 0; round < 200; ++round) {
        bool caught = false;
        try {
            acnet::parallel_for(1000, [&](int64_t i) {
                if (i % 100 == round % 100) throw std::runtime_error("x");
            });
        } catch (const std::runtime_error &) {
            caught = true;
        }
        std::atomic<int64_t> sum{0};
        acnet::parallel_for(1000, [&](int64_t i) { sum += i; });
        if (!caught || sum != 499500 || acnet::in_parallel()) return 1;
        acnet::set_num_threads(2 + round % 3);
    }
    std::puts("ok");
}
