// Launchers of one body and dtype each, defined by the files in instances/.
#pragma once

#include "launch.h"

namespace aqlm {

template <typename T>
cudaError_t launch_lut(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_columns(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_owned(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_mma_exact(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_mma_int8(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_mma_ring(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_wgmma(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_wgmma_int8(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_wgmma_wide(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_wgmma_long(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_split(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_split_wgmma(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_gather(const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_reduce(const MatmulParams& p, cudaStream_t stream);
template <typename T>
cudaError_t launch_fragments(const LaunchConfig& c, const MatmulParams& p, cudaStream_t stream);

}  // namespace aqlm
