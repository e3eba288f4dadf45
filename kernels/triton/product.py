"""A few tokens times rows of a stored matrix: the inner loop that linear layers, router and experts share.

Every program multiplies a tile of at most 64 tokens by some rows of a matrix, over part or all of its width.
With so few tokens the time goes into reading the matrix, so it is read once, as stored, and widened in
registers; activations come from the L2 cache again and again.

Two layouts of the product are worth having. With tokens as M (``swap`` off) 16 of them fill the rows of an
mma.sync, and any number of matrix rows its columns. With the matrix as M (``swap`` on) 64 of its rows feed a
whole warp group's wgmma, tokens are its columns; only there e4m3 is multiplied as it is, without conversion.

NVFP4 has eight columns in a 32-bit word, a nibble s e e m each. A nibble becomes a float by moving its bits
to where bfloat16 has the sign, the end of the exponent and the start of the mantissa; that is the number
times 2^-126, subnormal 0.5 included. Times block scale * 2^118 it is the weight times 2^-8, exact in
bfloat16, and the 2^8 is paid once, at the end. One shift brings nibbles c and c + 4 into the two halves of a
register, so each of c = 0 .. 3 is a product of its own: of every eighth column from c and from c + 4. The
order in which columns are added up is free, as long as activations come in the same one.

Triton's interpreter computes wrongly with bfloat16, so ``operand`` is float32 there; as it is, anywhere, for
activations in float32, which no matrix unit multiplies: right, and slow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.pdl import fetch_rows


@triton.jit
def _activations(
    x: tl.tensor,
    norm: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    start: tl.tensor,
    step: tl.constexpr,
    normed: tl.constexpr,
    pairs: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """[tokens, step] from x, or its even and odd columns [tokens, step / 2]; and their sums of squares."""
    count: tl.constexpr = step // 2 if pairs else step
    at = (start // 2 if pairs else start) + tl.arange(0, count)
    read = tl.load(x + rows[:, None] + at[None, :], mask=live[:, None], other=0)
    if pairs:
        even, odd = _halves(read)
    else:
        even, odd = read, read
    squares = tl.zeros([rows.shape[0]], tl.float32)
    if normed:
        factor = tl.load(norm + at)
        if pairs:
            low, high = _halves(factor)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
            squares += tl.sum(even * even + odd * odd, axis=1)
            even, odd = even * low.to(tl.float32)[None, :], odd * high.to(tl.float32)[None, :]
        else:
            even = even.to(tl.float32)
            squares += tl.sum(even * even, axis=1)
            even = even * factor.to(tl.float32)[None, :]
            odd = even
    return even, odd, squares


@triton.jit
def _halves(words: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The two bfloat16 of each 32-bit word, or the two float32 of each 64-bit one, the lower one first."""
    if words.dtype == tl.int64:
        low = words.to(tl.int32).to(tl.float32, bitcast=True)
        high = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, high


@triton.jit
def _two_nibbles(words: tl.tensor, number: tl.constexpr, operand: tl.constexpr) -> tl.tensor:
    """Nibbles ``number`` and ``number + 4`` of each 32-bit word, [.., 2]: their e2m1 times 2^-126."""
    if operand == tl.bfloat16:  # both at once, each in its half of a register
        bits = ((words >> (4 * number) << 6) & 0x01C001C0) | ((words >> (4 * number) << 12) & -2147450880)
        low, high = _halves(bits)
    else:
        low, high = _wide_nibble(words >> (4 * number)), _wide_nibble(words >> (4 * number + 16))
    return tl.join(low, high)


@triton.jit
def _wide_nibble(words: tl.tensor) -> tl.tensor:
    """The lowest four bits, e2m1, times 2^-126 in float32."""
    return (((words & 7) << 22) | ((words & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def _every_fourth(columns: tl.tensor, shape: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of eight columns c the even ones (or the odd ones), [tokens, n / 2] -> those that a word's nibbles
    number 0 and 4 (1 and 5) multiply, and those that 2 and 6 (3 and 7) do; [tokens, n / 4] each."""
    four = columns.reshape(shape[0], shape[1] // 2, 2, 2)
    first, second = four.split()
    return first.reshape(shape[0], shape[1]), second.reshape(shape[0], shape[1])


@triton.jit
def _add_product(
    total: tl.tensor, x: tl.tensor, weight: tl.tensor, swap: tl.constexpr, exact: tl.constexpr
) -> tl.tensor:
    """total += x [tokens, k] times weight [rows, k]; total is [rows, tokens] where swapped."""
    precision: tl.constexpr = "ieee" if exact else "tf32"
    # the matrix unit adds FP8 products with few bits: empty it often
    often: tl.constexpr = min(x.shape[1], 128) if x.dtype == tl.float8e4nv else None
    if swap:
        return tl.dot(weight, tl.trans(x), total, input_precision=precision, max_num_imprecise_acc=often)
    else:  # noqa: RET505 - Triton would compile what follows a return as well
        return tl.dot(x, tl.trans(weight), total, input_precision=precision, max_num_imprecise_acc=often)


@triton.jit
def multiply(
    x: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    block_scales: tl.tensor,
    x_rows: tl.tensor,
    live: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    inverse_input_scale: tl.tensor,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    step: tl.constexpr,
    normed: tl.constexpr,
    nvfp4: tl.constexpr,
    rounded: tl.constexpr,
    swap: tl.constexpr,
    operand: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens times matrix rows over columns first .. last, [num_tokens, num_rows] float32, without scales;
    and the sum of x squared over them, [num_tokens], where it is normed.

    For NVFP4, x and norm are read two columns at a time, weight by 32-bit words. x_rows: [num_tokens], where
    a token begins in x; live: which exist; rows: [num_rows] int64, rows of the matrix; step: columns at a
    time, a divisor of last - first. rounded: x is multiplied by ``inverse_input_scale`` and rounded to e4m3,
    as the matrix is stored.
    """
    exact: tl.constexpr = operand == tl.float32
    kind: tl.constexpr = tl.float8e4nv if rounded else operand
    shape: tl.constexpr = [num_rows, num_tokens] if swap else [num_tokens, num_rows]
    total = tl.zeros(shape, tl.float32)
    squares = tl.zeros([num_tokens], tl.float32)
    for start in range(first, last, step):
        even, odd, of_step = _activations(x, norm, x_rows, live, start, step, normed, nvfp4)
        squares += of_step
        if nvfp4:
            blocks: tl.constexpr = step // 16
            at = start // 8 + tl.arange(0, step // 8)
            words = tl.load(weight + rows[:, None] * (width // 8) + at[None, :])
            block = start // 16 + tl.arange(0, blocks)
            scales = tl.load(block_scales + rows[:, None] * (width // 16) + block[None, :])
            scales = (scales.to(tl.float32) * 3.3230699894622897e35).to(operand)  # 2^118
            scales = tl.broadcast_to(scales[:, :, None], [num_rows, blocks, 4]).reshape(
                num_rows, step // 8, 2
            )
            quarter: tl.constexpr = [num_tokens, step // 4]
            even, more_even = _every_fourth(even.to(kind), quarter)
            odd, more_odd = _every_fourth(odd.to(kind), quarter)
            for number in tl.static_range(4):
                if number == 0:
                    columns = even
                elif number == 1:
                    columns = odd
                elif number == 2:
                    columns = more_even
                else:
                    columns = more_odd
                matrix = (_two_nibbles(words, number, operand) * scales).reshape(num_rows, step // 4)
                total = _add_product(total, columns, matrix, swap, exact)
        else:
            at = start + tl.arange(0, step)
            matrix = tl.load(weight + rows[:, None] * width + at[None, :])
            if matrix.dtype != kind:  # by way of float32: straight to bfloat16 takes slower instructions
                matrix = matrix.to(tl.float32).to(kind)
            if rounded:
                even = tl.clamp(even.to(tl.float32) * inverse_input_scale, -448.0, 448.0)
            total = _add_product(total, even.to(kind), matrix, swap, exact)
    if nvfp4:
        total *= 256.0
    if swap:
        total = tl.trans(total)
    return total, squares


@triton.jit
def fetch_matrix(
    weight: tl.tensor,
    block_scales: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    num_rows: tl.constexpr,
    nvfp4: tl.constexpr,
) -> None:
    """Fetch ahead the beginning of what ``multiply`` will read of a matrix; arguments as there."""
    if nvfp4:
        fetch_rows(weight + rows * (width // 8) + first // 8, (last - first) // 2, num_rows)
        fetch_rows(block_scales + rows * (width // 16) + first // 16, (last - first) // 16, num_rows)
    else:
        size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        fetch_rows(weight + rows * width + first, (last - first) * size, num_rows)


@triton.jit
def arrived_last(counter: tl.tensor, expected: tl.tensor) -> tl.tensor:
    """Count this program in; whether it is the last of those expected, and so sees what all have stored.

    The counter, zero before, is zero again once all have arrived. Whoever reads what others stored must ask
    the L2 cache for it (``.cg``).
    """
    tl.debug_barrier()  # all threads have stored what this program will be counted in for
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last
