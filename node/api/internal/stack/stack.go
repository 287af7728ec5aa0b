// Package stack gives a goroutine its stack at once.
//
// A goroutine begins with two kilobytes or a few, and when they are used up all its frames are copied into a stack of twice the size, and
// again, each time more of them. Upstream hands a request through three goroutines whose calls are some sixty deep; copying them was up to a tenth of what
// a request costs. At the beginning, when there are few frames, one step to the final size costs next to nothing.
//
// The collector takes back half of a stack of which less than a quarter is in use, so goroutines that live long lose nothing by it. Any goroutine may call
// it for itself.
package stack

// never is zero, which the compiler cannot know.
var never int

// Small, Medium and Large leave room for frames of at least 5, 11 and 22 KiB: stacks of 8, 16 and 32 KiB.
func Small() { _ = small(never) }

// Medium is for what reads.
func Medium() { _ = medium(never) }

// Large is for what writes.
func Large() { _ = large(never) }

// The room is there when the function is entered; its array is not touched.

//go:noinline
func small(i int) byte {
	if i == 0 {
		return 0
	}
	var room [5 << 10]byte
	room[i] = 1
	return room[i/2]
}

//go:noinline
func medium(i int) byte {
	if i == 0 {
		return 0
	}
	var room [11 << 10]byte
	room[i] = 1
	return room[i/2]
}

//go:noinline
func large(i int) byte {
	if i == 0 {
		return 0
	}
	var room [22 << 10]byte
	room[i] = 1
	return room[i/2]
}
