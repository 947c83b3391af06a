// SPDX-License-Identifier: Apache-2.0
#define SIMT_FORCE_UCONTEXT  // the route of systems that have no switch of their own in fiber.h
#include "planted_main.cpp"
