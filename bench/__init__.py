"""Microbenchmarks: ``python -m gradstep bench``.

What is compared is one optimizer step: gradients in, parameters and states updated; with ``--chain`` a whole step, with what
stands around the rule; with ``--format`` a step on arrays of fewer bits. How it is measured, so that a comparison is fair to everyone:

* **One memory.** All contenders of a case work on the same arrays (NumPy arrays and torch tensors that share memory, aligned to
  64 bytes as torch allocates them), so that alignment and page placement favour nobody. Only optax, whose arrays can't be
  written, and the states of the NumPy expression, which makes new ones each step, have memory of their own.
* **In turns.** A measurement is a block of calls that lasts at least two milliseconds. Blocks alternate, A B C A B C, so that a
  slower or faster minute of the machine meets everyone. Reported are the median over the blocks of the time a call, and the
  quartiles.
* **In quiet.** OpenMP threads, torch's and numba's, go on spinning for milliseconds after their work, XLA's for a little. So
  before each block we wait until no other thread of the process runs: nobody's threads compete with the next contender's. Then
  come untimed calls, which wake the contender's own threads and fill the caches (none for calls over 50 ms, which find the
  caches empty anyway): each runs in its own best state, as in a training loop. The garbage collector is off.
* **On equal threads.** ``--threads`` sets gradstep's, torch's (DeepSpeed uses the same) and numba's. NumPy's expression has one
  thread always, and optax as many as XLA takes when it starts: both are marked. The faces for NumPy run on gradstep's own
  threads, the torch classes on torch's, as they do for their users.
* **Right before fast.** Each contender first makes some steps on a small problem, with settings far from the defaults and new
  gradients each step, and must agree with the formula in float64. One that does not is reported and not timed.
* **What the machine can do** is measured in the same turns, on the same memory: a loop over the same streams with the same
  threads and no math (for many tensors: as if they were one).

The settings are torch's defaults, with a little weight decay for every rule. They and the gradients, which stay the same during
a measurement, are such that no state decays into denormals, which would slow down every contender but gradstep.

Bytes a step are those that it has to move: parameter, states and averages read and written, gradient read, and written if it is
zeroed. What a norm scales is read once more, as the norm has to be known first (norms of rows and of small tensors cost no second
reading: caches hold them). For AdamW in float32 that is 28 bytes a parameter, for the chain ``full`` 44, for LAMB 40. Contenders
that make a pass for each operation move more; what they reach of the limit says how far from the least they are.

Whole steps differ in two points. Where a contender's step changes the gradients (torch scales and clips them in place, some zero
them), they are set anew before each call, untimed, as a backward pass would do; so each call is timed by itself. And each face of
gradstep is measured a second time without the stages, marked ``off``: what they cost. Its "gain" is time on over time off, turned
around: 0.9x means that the stages cost a ninth.

Storage formats differ in four. Bytes are those of the format: for AdamW 14 a parameter if all is bfloat16, 16.06 with states of 8
bits and their scales. The loop without math goes over the same bytes, as it goes over those of float32: nothing is converted. Each
face of gradstep is measured a second time in float32 throughout, in the same turns, marked ``float32``; its "gain" says how many
times faster the format is. (These runs have memory of their own.) And contenders are held to float64 as far as the format can hold
it: on average over a tensor, parameters may be off by some percent of the way, or a rounding.

What a format costs in precision shows after many steps, not after a few. So everyone's distance from float64 is measured as well:
the root of its mean square after 200 steps with the usual settings, in units of that of the way there. Gradients are half signal,
the same at all steps, and half noise; everyone, the reference included, gets them as the format has rounded them.

On a GPU (``--device cuda``) four things differ, and the rest is the same code:

* **The clock** is the device's: events around a block of steps, on the stream on which they are launched. Where launching takes longer
  than running, as with many small tensors, that is the time of launching, and the host's processor matters. The time by the host's
  clock stands beside it.
* **The limit** is a copy, torch's ``copy_`` of 2 GiB on the device, bytes read and written, in the same turns. Steps on what fits the
  device's cache may go beyond it.
* **The memory** is one for all there as well: tensors, aligned as torch's allocator does it. bitsandbytes and torchao, which have codes
  of their own, keep states of their own. One tensor that is too large for the free memory is reduced to what there is room for.
* **Graphs**: a step that is captured once and replayed is a contender of its own, gradstep's and torch's, up to 64 million elements.
  The steps that it takes before the capture count when it is checked.
"""
