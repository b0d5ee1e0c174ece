"""Run a Gluon kernel on the CPU, one program after the other, as Triton's interpreter does not: for kernels/sgmm_panel.py's part of the language.

What is asynchronous happens as late as it may: a copy lands when it is waited for, a product reads shared memory when it is waited for. What
one thread must not assume of the others raises: a copy into a buffer that a product may still read, a product from one that may not be filled.
Parts of a program run in threads of their own, meet at barriers in shared memory, and may not touch each other's buffers before.
"""

from __future__ import annotations

import threading
import types
from dataclasses import dataclass

import torch


class HazardError(AssertionError):
    """Shared memory touched without the wait, fence or barrier that it takes."""


@dataclass
class Pointer:
    """Addresses in bytes; memory is that of the tensors given, and nothing else."""

    at: torch.Tensor
    element: torch.dtype
    memory: list[torch.Tensor]

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.element)

    def __add__(self, offset):
        return Pointer(self.at + offset * self.element.itemsize, self.element, self.memory)

    def __getitem__(self, index):
        return Pointer(self.at[index], self.element, self.memory)

    def of(self, address):
        return Pointer(address, self.element, self.memory)

    def cells(self):
        """Return the storage all addresses are in, and where."""
        for tensor in self.memory:
            flat = torch.empty(0, dtype=self.element).set_(tensor.untyped_storage())
            index = (self.at - flat.data_ptr()) // flat.element_size()
            pairs = self.element == torch.int32 and tensor.element_size() == 2
            if (tensor.dtype == self.element or pairs) and index.min() >= 0 and index.max() < len(flat):
                return flat, index
        raise IndexError("outside of all tensors")


HERE = threading.local()
"""Its `block`: the program, or the part of one, that this thread runs."""
LONGEST_WAIT_S = 30


class Shared:
    """Shared memory of several buffers; a buffer is what is copied into, read and tracked."""

    def __init__(self, shape, element):
        self.values = torch.full(shape, float("nan") if element.is_floating_point else 0, dtype=element)

    def index(self, slot):
        return Buffer(self, int(slot), self.values[int(slot)])


@dataclass
class Buffer:
    """A view of one buffer."""

    shared: Shared
    slot: int
    view: torch.Tensor

    @property
    def key(self):
        return id(self.shared), self.slot

    def permute(self, order):
        return Buffer(self.shared, self.slot, self.view.permute(order))

    def slice(self, start, length, dim):
        return Buffer(self.shared, self.slot, self.view.narrow(dim, start, length))

    def store(self, values):
        block = HERE.block
        for other in block.family:
            other.must_not_be_read(self.key)
            other.visible.discard(self.key)
        block.published.discard(self.key)
        self.view.copy_(values)
        block.unfenced.add(self.key)


class Product:
    """A product begun: its sum can be read once it is waited for."""

    def __init__(self, a, b, start):
        self.a, self.b, self.start, self.value = a, b, start, None

    def run(self):
        start = self.start.value if isinstance(self.start, Product) else self.start
        self.value = start + self.a.view.float() @ self.b.view.float()


class Meeting:
    """A barrier in shared memory: each part's threads arrive as one."""

    def __init__(self, count):
        self.count, self.arrived, self.phase, self.changed = count, 0, 0, threading.Condition()

    def arrive(self):
        if HERE.block.read or HERE.block.products or HERE.block.unfenced or HERE.block.fenced:
            raise HazardError("arrived before what was begun is done")
        with self.changed:
            HERE.block.published |= HERE.block.visible
            self.arrived = (self.arrived + 1) % self.count
            if not self.arrived:
                self.phase += 1
                self.changed.notify_all()

    def wait(self, phase):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != phase, LONGEST_WAIT_S):
                raise HazardError("the other parts do not come")
            HERE.block.visible |= HERE.block.published


class Block:
    """The asynchronous state of one program, or of one of its parts."""

    def __init__(self, program, programs):
        self.program, self.programs = program, programs
        self.family, self.published = [self], set()
        self.groups, self.group, self.products = [], [], []
        self.unfenced, self.fenced, self.landed, self.visible = set(), set(), set(), set()
        self.read: set[tuple[int, int]] = set()  # by products that other threads may not have waited for

    def must_not_be_read(self, key):
        if key in self.read or any(key in (p.a.key, p.b.key) for p in self.products):
            raise HazardError(f"buffer {key[1]} may still be read")

    def copy(self, buffer, pointers, mask=None):
        self.must_not_be_read(buffer.key)
        if any(buffer.key == other.key for group in self.groups for other, _ in group):
            raise HazardError(f"two copies into buffer {buffer.slot}")
        buffer.view.fill_(float("nan"))
        self.visible.discard(buffer.key)
        wanted = mask is None or bool(mask)
        self.group.append((buffer, load(pointers) if wanted else torch.zeros_like(buffer.view)))

    def commit(self):
        self.groups.append(self.group)
        self.group = []

    def wait_copies(self, left):
        while len(self.groups) > left:
            for buffer, values in self.groups.pop(0):
                buffer.view.copy_(values)
                self.landed.add(buffer.key)

    def fence(self):
        self.fenced |= self.unfenced
        self.unfenced.clear()

    def barrier(self):
        self.visible |= self.landed | self.fenced
        self.landed.clear()
        self.fenced.clear()
        self.read.clear()

    def multiply(self, a, b, start, *, is_async):
        assert is_async
        for buffer in (a, b):
            if buffer.key not in self.visible:
                raise HazardError(f"buffer {buffer.slot} may not be filled")
        self.products.append(Product(a, b, start))
        return self.products[-1]

    def wait_products(self, left, deps):
        while len(self.products) > left:
            product = self.products.pop(0)
            product.run()
            self.read |= {product.a.key, product.b.key}
        (last,) = deps
        return last if last in self.products else last.value


def load(pointers, mask=None, eviction_policy=""):
    """Load; what is masked out is NaN, in pairs too."""
    if mask is not None and not bool(mask):
        nothing = float("nan") if pointers.element.is_floating_point else 0x7FC07FC0
        return torch.full(pointers.at.shape, nothing, dtype=pointers.element)
    flat, index = pointers.cells()
    return flat[index]


def store(pointers, values, eviction_policy=""):
    flat, index = pointers.cells()
    assert index.unique().numel() == index.numel()
    flat[index] = values


def multiple_of(value, unit):
    assert (value % unit == 0).all()
    return value


def in_parts(module, block, parts):
    """Run each part of a program in a thread of its own, with what the program has allocated."""
    errors = []
    blocks = [Block(block.program, block.programs) for _ in parts]
    for part in blocks:
        part.family, part.published = blocks, block.published

    def run(part, function, arguments):
        HERE.block = part
        try:
            names(module, part)[function.__name__](*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(part, *what)) for part, what in zip(blocks, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def language(module, block):
    """Return the names a kernel takes from Gluon."""
    return types.SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32,
        arange=lambda first, end, layout: torch.arange(first, end, dtype=torch.int32),
        load=load, store=store, multiple_of=multiple_of, static_range=range, where=torch.where,
        program_id=lambda axis: block.program, num_programs=lambda axis: block.programs,
        maximum=lambda x, least: x.clamp(min=least), to_tensor=torch.tensor, thread_barrier=block.barrier,
        reshape=torch.reshape, permute=torch.permute, convert_layout=lambda x, layout: x,
        allocate_shared_memory=lambda element, shape, layout: Shared(shape, element),
        warp_specialize=lambda parts, warps, registers: in_parts(module, block, parts),
        SliceLayout=lambda *of: None, NVMMASharedLayout=lambda **of: None,
    )  # fmt: skip


def names(module, block):
    """Return a module's globals with all of Gluon replaced, its functions included."""
    made = {**vars(module), "gl": language(module, block)}
    made |= {name: value.value for name, value in vars(module).items() if type(value).__name__ == "constexpr"}
    made["async_copy"] = types.SimpleNamespace(
        async_copy_global_to_shared=block.copy, commit_group=block.commit, wait_group=block.wait_copies
    )
    made["range"] = lambda *bounds: (torch.tensor(turn) for turn in range(*map(int, bounds)))
    made["fence_async_shared"] = block.fence
    made["mbarrier"] = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda shared, count: setattr(shared, "meeting", Meeting(count)),
        arrive=lambda shared, count: shared.meeting.arrive(),
        wait=lambda shared, phase: shared.meeting.wait(int(phase)),
    )
    made["warpgroup_mma"], made["warpgroup_mma_wait"] = block.multiply, block.wait_products
    for name, value in vars(module).items():
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            made[name] = types.FunctionType(value.fn.__code__, made, name, value.fn.__defaults__)
        elif name.endswith("_layout"):
            made[name] = lambda *of: None
    made["address_at"] = lambda record, like, column: like.of(multiple_of(load(record + column), 16))
    made["pairs_at"] = lambda *of: Pointer(made["address_at"](*of).at, torch.int32, of[1].memory)
    made["widen"] = lambda pairs, like, rows, columns: pairs.view(like.element).float()
    made["narrow"] = lambda x, like, rows, columns: x.to(like.element).view(torch.int32)
    return made


class Emulated:
    """A kernel of a module, launched as the kernel is. memory: the tensors it may touch besides its arguments."""

    def __init__(self, module, name, memory):
        self.module, self.name, self.memory = module, name, memory

    def __getitem__(self, grid):
        def launch(*arguments, maxnreg=None, **constants):
            tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
            memory = [*tensors, *self.memory]
            given = [
                Pointer(torch.tensor(value.data_ptr()), value.dtype, memory)
                if isinstance(value, torch.Tensor)
                else value
                for value in arguments
            ]
            for program in range(grid[0]):
                HERE.block = Block(program, grid[0])
                names(self.module, HERE.block)[self.name](*given, **constants)

        return launch
