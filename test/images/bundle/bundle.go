// Package bundle builds the images of the project's tests and demo, without a registry or a container builder:
//
//	skein.local/web:1    the program of test/images/app alone; it serves HTTP on 8080
//	skein.local/tools:1  the same program, and busybox with links for all its commands
//
// for Linux on the architecture that it runs on. It calls the go command, and for busybox it may call apt-get.
package bundle

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"skein.io/skein/node/cri/image"
)

// Names of the images.
const (
	Web   = "skein.local/web:1"
	Tools = "skein.local/tools:1"
)

// Paths of the two archives.
type Paths struct{ Web, Tools string }

// Config says what to build.
type Config struct {
	// Out is the directory of the archives, web.tar and tools.tar. It is made. Required.
	Out string
	// Busybox is the path of a static busybox, "none" to leave it out, or "auto" (default): an installed one, or else the one of the
	// distribution's package busybox-static, downloaded but not installed.
	Busybox string
}

// Build makes both images.
func Build(ctx context.Context, cfg Config) (Paths, error) {
	p := Paths{Web: filepath.Join(cfg.Out, "web.tar"), Tools: filepath.Join(cfg.Out, "tools.tar")}
	if err := os.MkdirAll(cfg.Out, 0o755); err != nil {
		return p, fmt.Errorf("images: %w", err)
	}
	tmp, err := os.MkdirTemp(cfg.Out, ".build-")
	if err != nil {
		return p, fmt.Errorf("images: %w", err)
	}
	defer os.RemoveAll(tmp)
	app, err := buildApp(ctx, tmp)
	if err != nil {
		return p, err
	}
	if err := write(p.Web, webSpec(app)); err != nil {
		return p, err
	}
	box, err := busybox(ctx, cfg.Busybox, tmp)
	if err != nil {
		return p, err
	}
	spec := webSpec(app)
	spec.Name, spec.Cmd, spec.User, spec.Env = Tools, []string{"sleep"}, "", []string{"PATH=/:/bin"}
	if box != nil {
		applets, err := applets(ctx, box, tmp)
		if err != nil {
			return p, err
		}
		spec.Files = append(spec.Files, image.File{Path: "/bin/busybox", Mode: 0o755, Content: box})
		for _, a := range applets {
			spec.Files = append(spec.Files, image.File{Path: "/bin/" + a, Link: "busybox"})
		}
	}
	return p, write(p.Tools, spec)
}

func webSpec(app []byte) image.Spec {
	return image.Spec{
		Name: Web, Arch: runtime.GOARCH, Entrypoint: []string{"/app"}, Cmd: []string{"web"}, Env: []string{"PATH=/"}, User: "65534:65534",
		Files: []image.File{
			{Path: "/app", Mode: 0o755, Content: app},
			{Path: "/tmp", Dir: true, Mode: 0o1777},
			{Path: "/etc/passwd", Mode: 0o644, Content: []byte("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
			{Path: "/etc/group", Mode: 0o644, Content: []byte("root:x:0:\nnogroup:x:65534:\n")},
		},
	}
}

func write(path string, s image.Spec) error {
	var b bytes.Buffer
	if err := image.Write(&b, s); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("image %s: %w", s.Name, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("image %s: %w", s.Name, err)
	}
	return nil
}

// buildApp compiles the program; its bytes depend on the sources and the compiler only.
func buildApp(ctx context.Context, dir string) ([]byte, error) {
	out := filepath.Join(dir, "app")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", out, "skein.io/skein/test/images/app")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the program of the images: %w\n%s", err, msg)
	}
	return os.ReadFile(out)
}

// busybox gives the executable that cfg asks for; nil = none.
func busybox(ctx context.Context, want, tmp string) ([]byte, error) {
	switch want {
	case "none":
		return nil, nil
	case "", "auto":
		for _, p := range []string{"/usr/bin/busybox", "/bin/busybox"} {
			if b, err := static(p); err == nil {
				return b, nil
			}
		}
		p, err := downloadBusybox(ctx, tmp)
		if err != nil {
			return nil, fmt.Errorf("%w; install it (apt-get install busybox-static), name a static one, or leave it out with -busybox none", err)
		}
		return static(p)
	default:
		return static(want)
	}
}

// static reads an executable that needs no library.
func static(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("busybox: %w", err)
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("busybox %s: %w", path, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("busybox %s is not static: take the one of the package busybox-static", path)
		}
	}
	return b, nil
}

// downloadBusybox unpacks the distribution's package into tmp.
func downloadBusybox(ctx context.Context, tmp string) (string, error) {
	var errs []error
	run := func(dir, name string, args ...string) {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil && len(errs) == 0 {
			errs = append(errs, fmt.Errorf("busybox: %s: %w: %s", name, err, bytes.TrimSpace(out)))
		}
	}
	run(tmp, "apt-get", "-o", "APT::Sandbox::User=root", "download", "busybox-static")
	debs, err := filepath.Glob(filepath.Join(tmp, "busybox-static_*.deb"))
	if err != nil || len(debs) == 0 {
		return "", errors.Join(append(errs, errors.New("busybox: the distribution's package busybox-static is not to be had"))...)
	}
	run(tmp, "dpkg-deb", "-x", debs[0], filepath.Join(tmp, "busybox-static"))
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	for _, p := range []string{"usr/bin/busybox", "bin/busybox"} {
		p = filepath.Join(tmp, "busybox-static", p)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("busybox: %s does not hold it where it should", filepath.Base(debs[0]))
}

// applets asks busybox for its commands.
func applets(ctx context.Context, box []byte, tmp string) ([]string, error) {
	exe := filepath.Join(tmp, "busybox")
	if err := os.WriteFile(exe, box, 0o755); err != nil {
		return nil, fmt.Errorf("busybox: %w", err)
	}
	out, err := exec.CommandContext(ctx, exe, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	var names []string
	for sc := bufio.NewScanner(bytes.NewReader(out)); sc.Scan(); {
		if n := strings.TrimSpace(sc.Text()); n != "" && n != "busybox" && !strings.Contains(n, "/") {
			names = append(names, n)
		}
	}
	return names, nil
}
