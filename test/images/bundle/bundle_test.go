package bundle

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBuild(t *testing.T) {
	p, err := Build(t.Context(), Config{Out: filepath.Join(t.TempDir(), "new"), Busybox: "none"})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{p.Web, p.Tools} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		found := false
		for tr := tar.NewReader(f); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			found = found || h.Name == "index.json"
		}
		if !found {
			t.Errorf("%s holds no image index", path)
		}
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(p.Web), ".build-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("scratch left: %v, %v", left, err)
	}
}

func TestBusyboxMustBeStatic(t *testing.T) {
	if _, err := static("/bin/sh"); err == nil || !strings.Contains(err.Error(), "not static") {
		t.Errorf("a dynamic executable was accepted: %v", err)
	}
}
