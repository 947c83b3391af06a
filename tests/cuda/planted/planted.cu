// SPDX-License-Identifier: Apache-2.0
// Every planted kernel, for nvcc: the PTX level runs these.
#include "gram.cuh"
#include "row_normalize.cuh"
#include "ticket_sum.cuh"
#include "window_sum.cuh"

#define ROW_NORMALIZE(f) template __global__ void planted::row_normalize_kernel<f>(const float*, float*, int)
#define GRAM(f) template __global__ void planted::gram_kernel<f>(const float*, float*, int, int)
#define TICKET_SUM(f) \
  template __global__ void planted::ticket_sum_kernel<f>(const float*, int, double*, unsigned*, double*)
#define WINDOW_SUM(f) template __global__ void planted::window_sum_kernel<f>(const float*, float*, int, int)
ROW_NORMALIZE(0);
ROW_NORMALIZE(1);
ROW_NORMALIZE(2);
ROW_NORMALIZE(3);
ROW_NORMALIZE(9);
GRAM(0);
GRAM(4);
GRAM(5);
GRAM(6);
TICKET_SUM(0);
TICKET_SUM(7);
TICKET_SUM(8);
TICKET_SUM(10);
TICKET_SUM(11);
WINDOW_SUM(0);
WINDOW_SUM(12);
WINDOW_SUM(13);
WINDOW_SUM(14);
WINDOW_SUM(15);
