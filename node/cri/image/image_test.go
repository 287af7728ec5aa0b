package image

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

func entries(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	m := map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return m
		}
		if err != nil {
			t.Fatal(err)
		}
		if m[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWriteIsAConsistentLayout(t *testing.T) {
	s := Spec{Name: "skein.local/x:1", Arch: "amd64", Entrypoint: []string{"/bin/x"}, Env: []string{"PATH=/bin"},
		Files: []File{{Path: "/bin/x", Mode: 0o755, Content: []byte("hello")}, {Path: "/bin/y", Link: "x"}, {Path: "/tmp", Dir: true, Mode: 0o1777}}}
	var a, b bytes.Buffer
	if err := errors.Join(Write(&a, s), Write(&b, s)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("the same input gave different archives")
	}
	es := entries(t, a.Bytes())
	var ix index
	if err := json.Unmarshal(es["index.json"], &ix); err != nil {
		t.Fatal(err)
	}
	if n := ix.Manifests[0].Annotations["io.containerd.image.name"]; n != s.Name {
		t.Errorf("name %q", n)
	}
	blob := func(d descriptor) []byte {
		c, ok := es["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
		if !ok || int64(len(c)) != d.Size {
			t.Fatalf("blob %s: there %v, %d bytes, want %d", d.Digest, ok, len(c), d.Size)
		}
		return c
	}
	var m manifest
	if err := json.Unmarshal(blob(ix.Manifests[0]), &m); err != nil {
		t.Fatal(err)
	}
	var c imageConfig
	if err := json.Unmarshal(blob(m.Config), &c); err != nil {
		t.Fatal(err)
	}
	if c.Architecture != "amd64" || c.OS != "linux" || c.RootFS.DiffIDs[0] != m.Layers[0].Digest || c.Config.Entrypoint[0] != "/bin/x" {
		t.Errorf("config %+v", c)
	}
	files := entries(t, blob(m.Layers[0]))
	if string(files["bin/x"]) != "hello" {
		t.Errorf("layer %v", files)
	}
	for _, want := range []string{"bin/", "bin/y", "tmp/"} {
		if _, ok := files[want]; !ok {
			t.Errorf("no %s in the layer", want)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{Name: "web:1", Arch: "amd64"}, "must be complete"},
		{Spec{Name: "skein.local/web", Arch: "amd64"}, "must be complete"},
		{Spec{Name: "skein.local/web:1"}, "architecture"},
		{Spec{Name: "skein.local/web:1", Arch: "amd64", Files: []File{{Path: "../x"}}}, "absolute"},
		{Spec{Name: "skein.local/web:1", Arch: "amd64", Files: []File{{Path: "/x"}, {Path: "/x"}}}, "twice"},
	} {
		if err := Write(io.Discard, c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: error %v, want %q", c.spec, err, c.want)
		}
	}
}

// TestPauseELF checks what can be checked of the program for an architecture that this machine cannot run.
func TestPauseELF(t *testing.T) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		b, err := PauseELF(arch)
		if err != nil {
			t.Fatal(err)
		}
		f, err := elf.NewFile(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", arch, err)
		}
		p := f.Progs[0]
		if f.Machine != machine || f.Type != elf.ET_EXEC || len(f.Progs) != 1 || p.Filesz != uint64(len(b)) || p.Flags != elf.PF_R|elf.PF_X {
			t.Errorf("%s: %+v %+v", arch, f.FileHeader, p.ProgHeader)
		}
		code := b[f.Entry-p.Vaddr:]
		var at int // where the code believes that the struct sigaction is
		switch arch {
		case "amd64": // lea rsi, [rip+n] is 7 bytes at offset 6
			at = 13 + int(int32(binary.LittleEndian.Uint32(code[9:])))
		case "arm64": // adr x1 is the second word
			w := binary.LittleEndian.Uint32(code[4:])
			at = 4 + int(w>>5&0x7ffff<<2|w>>29&3)
		}
		if at%8 != 0 || at+32 != len(code) || binary.LittleEndian.Uint64(code[at:]) != 1 {
			t.Errorf("%s: sigaction at %d of %d bytes: % x", arch, at, len(code), code)
		}
	}
	if _, err := PauseELF("riscv64"); err == nil {
		t.Error("an unknown architecture was accepted")
	}
}

// TestPauseRuns runs it as process 1 of a pid namespace: it must stay, use no CPU, and leave no zombie.
func TestPauseRuns(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for a pid namespace")
	}
	b, err := PauseELF(runtime.GOARCH)
	if err != nil {
		t.Skip(err)
	}
	exe := filepath.Join(t.TempDir(), "pause")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	// The shell leaves a child behind, whose parent ends; pause inherits it, and it must not stay as a zombie.
	cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", `(sleep 0.1 &) ; exec `+exe)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	children := func(pid string) []string {
		b, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
		return strings.Fields(string(b))
	}
	unshare := itoa(cmd.Process.Pid)
	var pause string
	waitFor(t, "the program to run", func() bool {
		for _, c := range children(unshare) {
			if l, _ := os.Readlink("/proc/" + c + "/exe"); l == exe {
				pause = c
			}
		}
		return pause != ""
	})
	waitFor(t, "its orphan to vanish", func() bool { return len(children(pause)) == 0 })
	st, err := os.ReadFile("/proc/" + pause + "/stat")
	if err != nil {
		t.Fatalf("pause ended: %v", err)
	}
	f := strings.Fields(string(st))
	if f[2] != "S" || f[13] != "0" || f[14] != "0" {
		t.Errorf("state %s, user %s and system %s ticks; want asleep with none", f[2], f[13], f[14])
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 5 s for %s", what)
		}
	}
}
