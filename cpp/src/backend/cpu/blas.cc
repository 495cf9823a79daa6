// OpenBLAS behind Sgemm, and its version. Found by third_party/FindOpenBlas.cmake; the build in the
// scipy-openblas32 package prefixes its symbols.
#include "backend/cpu/blas.h"

#include <cblas.h>

#include <string>

#include "backend/cpu/cpu_info.h"

#ifndef TIDAL_BLAS_PREFIX
#define TIDAL_BLAS_PREFIX
#endif
#define TIDAL_BLAS_PASTE(prefix, name) prefix##name
#define TIDAL_BLAS_EXPAND(prefix, name) TIDAL_BLAS_PASTE(prefix, name)
#define TIDAL_BLAS(name) TIDAL_BLAS_EXPAND(TIDAL_BLAS_PREFIX, name)

namespace tidal {

void Sgemm(const SgemmArgs& args) {
  TIDAL_BLAS(cblas_sgemm)
  (CblasRowMajor, CblasNoTrans, args.b_transposed ? CblasTrans : CblasNoTrans,
   static_cast<blasint>(args.m), static_cast<blasint>(args.n), static_cast<blasint>(args.k), 1.0f,
   args.a, static_cast<blasint>(args.lda), args.b, static_cast<blasint>(args.ldb),
   args.accumulate ? 1.0f : 0.0f, args.c, static_cast<blasint>(args.ldc));
}

void UseOneBlasThread() {
  TIDAL_BLAS(openblas_set_num_threads)(1);
}

std::string BlasDescription() {
  std::string config = TIDAL_BLAS(openblas_get_config)();
  const std::string name = "OpenBLAS ";
  if (config.rfind(name, 0) == 0) config.erase(0, name.size());
  return config;
}

}  // namespace tidal
