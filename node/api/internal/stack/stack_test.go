package stack

import (
	"runtime/debug"
	"testing"
	"unsafe"
)

// deep uses about n KiB of stack.
//
//go:noinline
func deep(n int) byte {
	var frame [1 << 10]byte
	if n > 0 {
		frame[n%len(frame)] = deep(n - 1)
	}
	return frame[never]
}

// moves tells whether the stack of a new goroutine is copied when n KiB of it are used after something was called.
func moves(first func(), n int) bool {
	moved := make(chan bool)
	go func() {
		first()
		var here int
		before := uintptr(unsafe.Pointer(&here)) // a number: it does not follow the stack
		deep(n)
		moved <- uintptr(unsafe.Pointer(&here)) != before
	}()
	return <-moved
}

// A stack that was made large enough is not copied any more; without, it is.
func TestGrowsAtOnce(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector takes back what is not in use
	for name, c := range map[string]struct {
		grow func()
		kib  int
	}{"small": {Small, 4}, "medium": {Medium, 9}, "large": {Large, 20}} {
		if moves(c.grow, c.kib) {
			t.Errorf("%s: a goroutine that uses %d KiB was copied", name, c.kib)
		}
	}
	if !moves(func() {}, 60) {
		t.Error("a goroutine that uses 60 KiB was not copied: this test sees nothing")
	}
}

func BenchmarkGoroutine(b *testing.B) {
	for name, first := range map[string]func(){"as it is": func() {}, "large": Large} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				moves(first, 20)
			}
		})
	}
}
