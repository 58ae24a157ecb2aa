"""Forward KL from a teacher's top-k tokens, against the full divergence and against autograd."""

import pytest
import torch

from nanohybrid.ops.losses import chunked_forward_kl, summed_top_k_kl, top_k_of

T, E, V, TAU = 7, 5, 11, 1.7


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((T, E), (V, E), (T, 4), (V, 4))
    ]


def rows_and_teacher(teacher_TE, teacher_VE, k):
    rows_R = torch.tensor([1, 2, 5, 6])
    return rows_R, top_k_of(teacher_TE[rows_R] @ teacher_VE.T, k, TAU)


def test_top_k_kl_with_the_whole_vocabulary_equals_the_full_divergence(parts):
    student_TE, student_VE, teacher_TE, teacher_VE = parts
    rows_R, teacher = rows_and_teacher(teacher_TE, teacher_VE, V)
    full_T = chunked_forward_kl(student_TE, student_VE, teacher_TE, teacher_VE, TAU)
    assert torch.isneginf(teacher.log_rest_R).all()
    assert summed_top_k_kl(student_TE, student_VE, rows_R, teacher, TAU).item() == pytest.approx(
        full_T[rows_R].sum().item(), rel=1e-5
    )


def test_top_k_kl_grows_with_k(parts):
    student, teacher = parts[:2], parts[2:]
    found = [summed_top_k_kl(*student, *rows_and_teacher(*teacher, k), TAU).item() for k in (1, 3, 6, V)]
    assert found == sorted(found) and 0 < found[0] < found[-1]


@pytest.mark.parametrize("k", [1, 4, V])
def test_top_k_kl_has_the_gradients_of_autograd(parts, k):
    student_TE, student_VE, teacher_TE, teacher_VE = parts
    rows_R, teacher = rows_and_teacher(teacher_TE, teacher_VE, k)
    grads = []
    for plain in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (student_TE, student_VE)]
        if plain:
            s_RV = (leaves[0][rows_R] @ leaves[1].T / TAU).softmax(-1)
            p_RK, s_RK = teacher.log_p_RK.exp(), s_RV.gather(1, teacher.ids_RK)
            loss = (p_RK * (p_RK / s_RK).log()).sum()
            if k < V:
                others = torch.ones_like(s_RV).scatter(1, teacher.ids_RK, 0.0)
                p_R, s_R = teacher.log_rest_R.exp(), (s_RV * others).sum(-1)
                loss = loss + (p_R * (p_R / s_R).log()).sum()
            loss = TAU**2 * loss
        else:
            loss = summed_top_k_kl(*leaves, rows_R, teacher, TAU)
        loss.backward()
        grads.append([loss.item(), *(leaf.grad for leaf in leaves)])
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-9)
    for name, ours, autograds in zip(("hidden", "head"), grads[0][1:], grads[1][1:], strict=True):
        torch.testing.assert_close(ours, autograds, msg=lambda text, name=name: f"{name}: {text}")
