package image

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// PauseName is the image that containerd starts first in each pod, to hold the pod's namespaces.
const PauseName = "skein.local/pause:1"

// The program of the pause image, in machine code: it tells the kernel to reap its children by itself (SIGCHLD
// ignored; it is process 1 of a shared pid namespace), then waits without end. It needs no handler for SIGTERM: a pod
// sandbox is stopped with SIGKILL. The runtime ends a sandbox that returns from here, so the wait is in a loop.
var pauseCode = map[string]struct {
	machine uint16 // e_machine, elf(5)
	// code, followed by a struct sigaction of the kernel that says SIG_IGN, at the next multiple of 8 bytes.
	code []byte
}{
	"amd64": {62, []byte{
		0x6a, 0x0d, 0x58, // push 13 (rt_sigaction); pop rax
		0x6a, 0x11, 0x5f, // push 17 (SIGCHLD); pop rdi
		0x48, 0x8d, 0x35, 0x13, 0x00, 0x00, 0x00, // lea rsi, [rip+19] (sigaction, at offset 32)
		0x31, 0xd2, // xor edx, edx
		0x6a, 0x08, 0x41, 0x5a, // push 8 (size of a signal set); pop r10
		0x0f, 0x05, // syscall
		0x6a, 0x22, 0x58, // push 34 (pause); pop rax
		0x0f, 0x05, // syscall
		0xeb, 0xf9, // jmp -7 (to push 34)
	}},
	"arm64": {183, words(
		0xd2800220, // mov x0, #17 (SIGCHLD)
		0x10000161, // adr x1, +44 (sigaction, at offset 48)
		0xd2800002, // mov x2, #0
		0xd2800103, // mov x3, #8 (size of a signal set)
		0xd28010c8, // mov x8, #134 (rt_sigaction)
		0xd4000001, // svc #0
		0xd2800000, // mov x0, #0
		0xd2800001, // mov x1, #0
		0xd2800003, // mov x3, #0
		0xd2800928, // mov x8, #73 (ppoll: arm64 has no pause)
		0xd4000001, // svc #0
		0x17fffffb, // b -20 (to mov x0: the call changes it)
	)},
}

func words(ws ...uint32) []byte {
	var b []byte
	for _, w := range ws {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

const (
	elfHeader  = 64
	progHeader = 56
	loadAt     = 0x400000
)

// PauseELF gives the static executable of the pause image (about 190 bytes) for a GOARCH.
func PauseELF(arch string) ([]byte, error) {
	p, ok := pauseCode[arch]
	if !ok {
		return nil, fmt.Errorf("no pause program for architecture %q: amd64 and arm64 have one", arch)
	}
	code := append([]byte(nil), p.code...)
	for len(code)%8 != 0 {
		code = append(code, 0)
	}
	sigaction := make([]byte, 32) // handler, flags, restorer, mask: 8 bytes each
	sigaction[0] = 1              // SIG_IGN
	code = append(code, sigaction...)

	size := uint64(elfHeader + progHeader + len(code))
	var b bytes.Buffer
	put := func(vs ...any) {
		for _, v := range vs {
			_ = binary.Write(&b, binary.LittleEndian, v) // fixed-size values into memory: cannot fail
		}
	}
	b.WriteString("\x7fELF\x02\x01\x01") // 64 bit, little endian, version 1
	b.Write(make([]byte, 9))
	put(uint16(2), p.machine, uint32(1))                                   // ET_EXEC
	put(uint64(loadAt+elfHeader+progHeader), uint64(elfHeader), uint64(0)) // entry, program headers, no section headers
	put(uint32(0), uint16(elfHeader), uint16(progHeader), uint16(1))       // flags, sizes, one program header
	put(uint16(0), uint16(0), uint16(0))                                   // no sections
	put(uint32(1), uint32(5), uint64(0), uint64(loadAt), uint64(loadAt))   // PT_LOAD, read + execute, the whole file
	put(size, size, uint64(0x10000))                                       // aligned for the largest page of arm64
	b.Write(code)
	return b.Bytes(), nil
}

// WritePause writes the archive of the pause image for a GOARCH.
func WritePause(w io.Writer, arch string) error {
	elf, err := PauseELF(arch)
	if err != nil {
		return err
	}
	return Write(w, Spec{
		Name: PauseName, Arch: arch,
		Files:      []File{{Path: "/pause", Mode: 0o755, Content: elf}},
		Entrypoint: []string{"/pause"},
		User:       "65535:65535", // as upstream's pause image
	})
}
