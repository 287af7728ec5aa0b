// Package clock shows another wall clock to a running process, and to it alone,
// so that jumps of the clock can be tried on one machine without touching the
// machine's own.
//
// A time namespace moves only the monotonic clocks, and only before a process
// starts. So the process's private copy of the kernel's vDSO is changed, from
// which every program takes the time, also a static one: clock_gettime asks the
// kernel and adds the offset to CLOCK_REALTIME. The monotonic clocks stay, as the
// kernel guarantees; what happens when they stand still is shown by stopping the
// process.
//
// It works on amd64 and needs the right to trace the process.
package clock

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// ErrUnsupported is returned where the code that is put into the vDSO cannot run.
var ErrUnsupported = errors.New("clock: only on amd64")

// stub is clock_gettime(clock edi, time rsi) with an offset:
//
//	mov eax, 228; syscall           the kernel's own answer
//	test eax, eax; jnz out
//	test edi, edi; jnz out          only CLOCK_REALTIME is 0
//	mov rcx, [rip+offset]; add [rsi], rcx
//	out: ret
//
// followed by the offset in seconds, aligned to 8 bytes.
var stub = []byte{
	0xb8, 0xe4, 0x00, 0x00, 0x00, 0x0f, 0x05,
	0x85, 0xc0, 0x75, 0x0e,
	0x85, 0xff, 0x75, 0x0a,
	0x48, 0x8b, 0x0d, 0x0a, 0x00, 0x00, 0x00, // rip is 22 then, the offset at 32
	0x48, 0x01, 0x0e,
	0xc3,
	0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0,
}

// offsetAt is where the offset is in stub.
const offsetAt = 32

// Clock of a process.
type Clock struct {
	pid  int
	mem  *os.File
	slot int64 // address of the offset
}

// Take over the wall clock of a process, which shows the right time until Set.
// The process should be stopped or young: a thread that reads the clock at this
// very moment may be disturbed.
func Take(pid int) (c *Clock, err error) {
	if elfMachine != elf.EM_X86_64 {
		return nil, ErrUnsupported
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("clock of process %d: %w", pid, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("clock of process %d: %w", pid, err), mem.Close())
		}
	}()
	base, size, err := vdso(pid)
	if err != nil {
		return nil, err
	}
	image := make([]byte, size)
	if _, err := mem.ReadAt(image, base); err != nil {
		return nil, err
	}
	entry, err := symbol(image, "__vdso_clock_gettime")
	if err != nil {
		return nil, err
	}
	at, err := room(image)
	if err != nil {
		return nil, err
	}
	if _, err := mem.WriteAt(stub, base+at); err != nil {
		return nil, err
	}
	jump := append([]byte{0xe9}, binary.LittleEndian.AppendUint32(nil, uint32(int32(at-(entry+5))))...)
	if _, err := mem.WriteAt(jump, base+entry); err != nil {
		return nil, err
	}
	return &Clock{pid, mem, base + at + offsetAt}, nil
}

// Set the process's clock off by whole seconds from the machine's.
func (c *Clock) Set(off time.Duration) error {
	b := binary.LittleEndian.AppendUint64(nil, uint64(int64(off/time.Second)))
	if _, err := c.mem.WriteAt(b, c.slot); err != nil {
		return fmt.Errorf("clock of process %d: %w", c.pid, err)
	}
	return nil
}

// Close forgets the process, whose clock stays as it is.
func (c *Clock) Close() error { return c.mem.Close() }

// vdso finds the mapping.
func vdso(pid int) (base, size int64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			var end int64
			if _, err := fmt.Sscanf(line, "%x-%x", &base, &end); err != nil {
				return 0, 0, err
			}
			return base, end - base, nil
		}
	}
	return 0, 0, errors.New("it has no vDSO")
}

func symbol(image []byte, name string) (int64, error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return 0, err
	}
	syms, err := f.DynamicSymbols()
	if err != nil {
		return 0, err
	}
	for _, s := range syms {
		if s.Name == name {
			return int64(s.Value), nil
		}
	}
	return 0, fmt.Errorf("the vDSO has no %s", name)
}

// room is unused space at the end of the image.
func room(image []byte) (int64, error) {
	at := (len(image) - len(stub)) &^ 63
	for i := range stub {
		if image[at+i] != 0 {
			return 0, errors.New("the vDSO has no room")
		}
	}
	return int64(at), nil
}
