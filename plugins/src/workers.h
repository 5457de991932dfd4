// Threads that stay, and share the work of a call with the thread that calls.
#pragma once

#include <algorithm>
#include <cstdint>

namespace asag {

// What is shared out: run(work, worker, begin, end) for parts of 0 to `count`, of `part` or less.
struct Job {
    void (*run)(const void* work, int worker, int64_t begin, int64_t end);
    const void* work;
    int64_t count;
    int64_t part;
};

// Does a job on up to `threads` threads.
void share_out(const Job& job, int threads);

// Calls work(worker, begin, end) for parts of 0 to `count`, on up to `threads` threads, this one among them, each with
// a number of its own below `threads`.  Parts go to whoever is free: where the others get no processor, this thread
// does all.  Returns when everything is done; throws std::bad_alloc before anything is, or not at all.
template <class Work>
void in_parallel(int64_t count, int threads, const Work& work) {
    constexpr int64_t PARTS = 8;  // for each thread, so that all end at about the same time
    const int64_t used = std::min<int64_t>(threads, count);
    if (used <= 1) {
        if (count > 0) work(0, int64_t{0}, count);
        return;
    }
    const auto run = [](const void* what, int worker, int64_t begin, int64_t end) {
        (*static_cast<const Work*>(what))(worker, begin, end);
    };
    share_out({run, &work, count, std::max<int64_t>(1, count / (PARTS * used))}, static_cast<int>(used));
}

}  // namespace asag
