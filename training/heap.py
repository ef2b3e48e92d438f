"""A process's memory on a CPU, where tensors come and go by the megabyte: what is freed is kept, on large pages, and
little else lies between."""

import ctypes
import mmap
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
OWN_MAPPING = 1 << 30  # bytes from which on a block is no part of the heap
HEAP_BLOCK = OWN_MAPPING // 2
KERNELS = 128  # an update of one shape asks for some 20 of them


def prepare_heap() -> None:
    """Before a process's first tensor. A C library other than glibc is left as it is."""
    keep_few_kernels()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        keep_freed_memory(libc)
        use_large_pages(libc)


def keep_few_kernels() -> None:
    """Have oneDNN, which multiplies matrices of 16 bits, forget all but the last kernels it made. It keeps 1,024, one
    for every shape, strewn over the heap: where batches differ in shape (pairs, rollouts, padded rows), what is freed
    between them fits nothing new, and memory grows fourfold. A value that the user has set stays."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def keep_freed_memory(libc: ctypes.CDLL) -> None:
    """Have glibc keep what is freed for the next tensor of its size. Left alone it gives all above 32 MB back to the
    system at once, and much below, and every update waits for thousands of pages to be made zero again: a fifth of a
    small model's time on a CPU."""
    libc.mallopt(M_MMAP_THRESHOLD, OWN_MAPPING)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def use_large_pages(libc: ctypes.CDLL) -> None:
    """Have Linux put the heap on pages of 2 MB, where it leaves that to programs, as most distributions do. Memory on
    pages of 4 KB is looked up page by page, and by a virtual machine twice: up to two thirds of an update there.

    The heap is made half of the machine's memory long at once, so that one call can mark it. Nothing is used by that:
    a page is taken when it is first written to.
    """
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    start = -(-libc.sbrk(0) // mmap.PAGESIZE) * mmap.PAGESIZE
    blocks = [libc.malloc(HEAP_BLOCK) for _ in range(memory // 2 // HEAP_BLOCK)]
    libc.madvise(start, libc.sbrk(0) - start, mmap.MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)
