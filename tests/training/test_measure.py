"""What is timed is what the trainer does, and kernels are of the kind that they look like."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bytelatent.model import PatchedStream, build_model
from bytelatent.training.profiling.measure import (
    DOCUMENT,
    KINDS,
    REST,
    SLOTS,
    Kernel,
    SyntheticTraining,
    TrainingSetup,
    by_kind,
    kernels_of,
    num_patches,
    random_batch,
    seconds_of,
)
from bytelatent.training.settings import OptimizerSettings
from tests.model.tiny import tiny_blt_settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 130, 560, 3 * DOCUMENT + 5])
def test_random_batches(size: int) -> None:
    stream, targets = random_batch(size, CPU)
    assert isinstance(stream, PatchedStream)
    assert stream.ids.shape == targets.shape == (size,)
    assert stream.document.bincount().tolist() == [min(DOCUMENT, size - i) for i in range(0, size, DOCUMENT)]
    assert stream.num_patches % SLOTS == 0
    assert num_patches(stream) == int(stream.patch.max()) + 1 <= stream.num_patches
    if size > 1000:
        assert 4 < size / (num_patches(stream) or 1) < 5
    plain, _ = random_batch(size, CPU, patched=False)
    assert not isinstance(plain, PatchedStream)
    assert num_patches(plain) is None
    assert torch.equal(plain.ids, stream.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_a_step_of_training(dtype: torch.dtype) -> None:
    """Against torch's own clipping and AdamW, and autocast spelled out."""
    optimizer = OptimizerSettings(clip=0.05, lr=1e-2)
    trainee = SyntheticTraining(TrainingSetup(tiny_blt_settings(), CPU, dtype, optimizer=optimizer))
    torch.manual_seed(0)
    model = build_model(tiny_blt_settings())
    plain = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if decays(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in model.named_parameters() if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    batch = random_batch(300, CPU)
    trainee.step(*batch)
    for stream, targets in (random_batch(256, CPU), batch):  # the first one was taken as it was made
        plain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(stream), targets)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        plain.step()
    found = dict(trainee.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def decays(name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == 2 and "embedding" not in name and "ngram_hash" not in name


def test_seconds_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work() -> None:
        calls.append(1)
        now[0] += 3.0 if len(calls) <= 2 else 1.0  # the first calls are slower

    assert seconds_of(work, CPU, times=5, warm=3) == 1.0
    assert len(calls) == 3 + 5
    calls.clear()
    assert seconds_of(work, CPU, times=100, warm=3, limit=7.0) == 1.0
    assert len(calls) == 3 + 7


# Names of the kinds that libraries, compilers and our kernels give on CUDA, and of operations on a CPU.
NAMED = {
    "patch attention": ["own_bytes_backward_kernel", "read_patch_kernel", "pool_kernel", "aten::scatter_reduce"],
    "hash tables": ["hash_embed_kernel", "row_sums_kernel", "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<"],
    "optimizer and clipping": [
        "row_adamw_kernel",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..FusedAdamMathFunctor<float",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..LpNormFunctor<float",
        "aten::_fused_adamw_",
        "aten::linalg_vector_norm",
    ],
    "attention": [
        "triton_tem_fused_flex_attention_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o<__nv_bfloat16, 128, 64>",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::bmm",
    ],
    "products": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm90<cutlass::gemm::kernel::GemmUniversal",
        "aten::mm",
    ],
    "norms and pointwise": [
        "triton_red_fused__fused_rms_norm_add_0",
        "triton_poi_fused_mul_silu_1",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float",
        "Memcpy DtoD (Device -> Device)",
        "aten::_fused_rms_norm",
        "aten::add_",
        "aten::mul",
    ],
    REST: ["aten::view", "something_new", "aten::t"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMED.items() for name in names])
def test_kinds_by_name(kind: str, name: str) -> None:
    assert Kernel(name, 1.0, 1).kind == kind


def test_all_time_is_of_some_kind() -> None:
    kernels = [Kernel(name, 0.5, 1) for names in NAMED.values() for name in names]
    found = by_kind(kernels)
    assert list(found) == [*KINDS, REST]
    assert found == {kind: 0.5 * len(NAMED[kind]) for kind in found}
    fewer = by_kind(kernels, absent={"hash tables"})
    assert fewer == {**{k: v for k, v in found.items() if k != "hash tables"}, REST: found[REST] + found["hash tables"]}


def test_kernels_of_a_product() -> None:
    a: Any = torch.randn(300, 300)
    kernels = {kernel.name: kernel for kernel in kernels_of(lambda: (a @ a) @ a, CPU, times=3)}
    assert kernels["aten::mm"].count == 2
    assert kernels["aten::mm"].seconds == max(kernel.seconds for kernel in kernels.values())
    assert kernels_of(lambda: a @ a, torch.device("mps"), times=1) == []
