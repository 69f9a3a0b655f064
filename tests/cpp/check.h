// A check that names its line and its values, and ends the test.
#ifndef SPARSE_RTRL_TESTS_CHECK_H_
#define SPARSE_RTRL_TESTS_CHECK_H_

#include <cstdlib>
#include <iostream>

#define CHECK(condition, ...)                                                                                \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #condition " failed " << "" __VA_ARGS__ << std::endl; \
      std::exit(1);                                                                                          \
    }                                                                                                        \
  } while (false)

#endif  // SPARSE_RTRL_TESTS_CHECK_H_
