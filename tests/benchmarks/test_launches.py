"""What a compiled engine launches, counted in its host code. test_absent_gpu.py counts in real ones."""

from __future__ import annotations

import zipfile

import pytest

from lcm_compile.benchmarks.gpu.launches import Array, launches_of, read_launches
from lcm_compile.errors import UsageError
from lcm_compile.graphs import StageContract, TensorSpec

# In the form in which torch 2.11 writes it: a convolution to twice the size, its bias added in place, and a
# product of its pixels in fp8, with a bias.
SOURCE = """
    constants_info_[0].name = "module_conv_weight";
    constants_info_[0].dtype = cached_torch_dtype_float16;
    constants_info_[0].shape = {4, 8, 4, 4};
    constants_info_[1].name = "module_conv_bias";
    constants_info_[1].dtype = cached_torch_dtype_float16;
    constants_info_[1].shape = {8};
    constants_info_[2].name = "module_wide_weight";
    constants_info_[2].dtype = cached_torch_dtype_float8_e4m3fn;
    constants_info_[2].shape = {32, 8};
    constants_info_[3].name = "module_wide_scale";
    constants_info_[3].dtype = cached_torch_dtype_float32;
    constants_info_[3].shape = {};
static inline void call_triton_poi_fused_convolution_0(
    const in_out_ptr0_type_& in_out_ptr0,
    const in_ptr0_type_& in_ptr0,
    int64_t xnumel,
    int32_t device_idx_
){
static inline void call_triton_poi_fused__scaled_mm_1(
    const in_ptr0_type_& in_ptr0,
    const in_ptr1_type_& in_ptr1,
    const out_ptr0_type_& out_ptr0,
    int64_t xnumel
){
void AOTInductorModel::run_impl(
    auto arg4_1 = std::move(inputs[0]);
    AtenTensorHandle buf0_handle;
    CHECK(aoti_torch_cuda_convolution(arg4_1, module_conv_weight, nullptr, \
std::array<int64_t, 2>{2L, 2L}.cbegin(), 2, std::array<int64_t, 2>{1L, 1L}.cbegin(), 2, \
std::array<int64_t, 2>{1L, 1L}.cbegin(), 2, 1, \
std::array<int64_t, 2>{0L, 0L}.cbegin(), 2, 1L, &buf0_handle));
    RAIIAtenTensorHandle buf0(buf0_handle);
    auto buf1 = std::move(buf0);  // reuse
    call_triton_poi_fused_convolution_0(buf1, module_conv_bias, 2048L, this->device_idx_, stream, kernels);
    static constexpr int64_t int_array_0[] = {256L, 8L};
    static constexpr int64_t int_array_1[] = {8L, 1L};
    AtenTensorHandle buf2_handle;
    CHECK(aoti_torch_empty_strided(2, int_array_0, int_array_1, cached_torch_dtype_float8_e4m3fn, \
cached_torch_device_type_cuda, this->device_idx_, &buf2_handle));
    call_triton_poi_fused__scaled_mm_1(buf1, module_wide_scale, buf2, 2048L, this->device_idx_, kernels);
    static constexpr int64_t int_array_2[] = {256L, 32L};
    static constexpr int64_t int_array_3[] = {8L, 32L};
    CHECK(aoti_torch_empty_strided(2, int_array_2, int_array_1, cached_torch_dtype_float16, \
cached_torch_device_type_cuda, this->device_idx_, &buf3_handle));
    CHECK(aoti_torch_cuda__scaled_mm_out(buf3, buf2, \
wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(module_wide_weight, 2, int_array_3, int_array_1, \
0L)), module_wide_scale, module_wide_scale, nullptr, nullptr, &var_0, 1));
"""


def test_what_is_launched_moved_and_multiplied():
    found = read_launches(SOURCE, [Array((1, 4, 8, 8), 2)])
    assert found.counts == {"convolutions": 1, "Triton": 2, "products": 1}
    # Each of 8·8 pixels of 4 channels goes to 4×4 of 8; and 256 pixels of 8 channels become 32.
    assert found.flop == {"convolutions": 2 * 64 * 4 * 16 * 8, "products": 2 * 256 * 8 * 32}
    doubled = 8 * 16 * 16
    assert found.kernels == {
        "triton_poi_fused_convolution_0": 2 * 2 * doubled + 2 * 8,  # read and written; the bias
        "triton_poi_fused__scaled_mm_1": 2 * doubled + 4 + doubled,
    }


def test_a_call_that_is_not_known_is_told():
    """It would be missing from all figures."""
    with pytest.raises(UsageError, match="sort_out"):
        read_launches(SOURCE + "    CHECK(aoti_torch_cuda_sort_out(buf1, buf2));", [Array((1, 4, 8, 8), 2)])


def test_an_engine_for_a_processor_launches_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "step.pt2", "w") as package:
        package.writestr("data/aotinductor/model/a.wrapper.cpp", "aoti_torch_cpu_convolution(")
    contract = StageContract("step", (TensorSpec("x", (1,), "float32", ""),), ())
    with pytest.raises(UsageError, match="not compiled for a GPU"):
        launches_of(tmp_path / "step.pt2", contract)
