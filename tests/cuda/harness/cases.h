// SPDX-License-Identifier: Apache-2.0
// What every family's <family>_main.cpp has for the sanitizers: a line a case, the order of execution from the command
// line, and an exit status: 0 right, 3 wrong values, 4 the harness stopped a launch; a sanitizer has its own.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simt_host.h"

namespace {

int wrong = 0;

void report(const std::string& name, bool right) {
  std::printf("%-60s %s\n", name.c_str(), right ? "right" : "WRONG VALUES");
  wrong += !right;
}

// PROGRAM ORDER SEED
int run_cases(int argc, char** argv, void (*run_all)()) {
  if (argc != 3) return 2;
  simt::options = {static_cast<simt::Order>(std::atoi(argv[1])), static_cast<std::uint64_t>(std::atoll(argv[2]))};
  try {
    run_all();
  } catch (const simt::Fault& fault) {
    std::fprintf(stderr, "FAULT %s\n", fault.what());
    return 4;
  }
  return wrong ? 3 : 0;
}

}  // namespace
