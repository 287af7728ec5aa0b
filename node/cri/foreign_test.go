package cri

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestInstallCNI(t *testing.T) {
	ours := []byte(`{"name":"skein-n1","plugins":[]}`)
	for _, c := range []struct {
		name   string
		before map[string]string // file in the directory of networks: contents
		fault  string
	}{
		{"empty", nil, ""},
		{"again", map[string]string{"10-skein.conflist": `{"name":"skein-n1"}`}, ""},
		{"others that come later", map[string]string{"99-bridge.conf": "{}", "05-notes.txt": ""}, ""},
		{"another network first", map[string]string{"05-bridge.conflist": "{}"}, "05-bridge.conflist"},
		{"another node's", map[string]string{"10-skein.conflist": `{"name":"skein-n2"}`}, `"skein-n2"`},
		{"not JSON", map[string]string{"10-skein.conflist": `hello`}, "10-skein.conflist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			dir, bin, helper := filepath.Join(root, "net.d"), filepath.Join(root, "bin"), filepath.Join(root, "helper")
			for name, text := range c.before {
				if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			err := InstallCNI(dir, bin, helper, ours)
			if c.fault != "" {
				if err == nil || !strings.Contains(err.Error(), c.fault) {
					t.Errorf("%v, want a refusal that names %s", err, c.fault)
				}
				for name, text := range c.before {
					if b, _ := os.ReadFile(filepath.Join(dir, name)); string(b) != text {
						t.Errorf("%s became %q", name, b)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if to, err := os.Readlink(filepath.Join(bin, HelperName)); err != nil || to != helper {
				t.Errorf("the plugin leads to %q, %v", to, err)
			}
			if b, _ := os.ReadFile(filepath.Join(dir, conflistName)); string(b) != string(ours) {
				t.Errorf("configuration %q", b)
			}
			// A new release lies elsewhere.
			if err := InstallCNI(dir, bin, helper+"2", ours); err != nil {
				t.Fatal(err)
			}
			if to, _ := os.Readlink(filepath.Join(bin, HelperName)); to != helper+"2" {
				t.Errorf("the plugin still leads to %q", to)
			}
			if err := RemoveCNI(dir, bin, helper+"2", "skein-n1"); err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{filepath.Join(bin, HelperName), filepath.Join(dir, conflistName)} {
				if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is left: %v", p, err)
				}
			}
			for name := range c.before {
				if _, err := os.Stat(filepath.Join(dir, name)); err != nil && name != conflistName {
					t.Errorf("%s went: %v", name, err)
				}
			}
		})
	}
}

// An operator's own copy of the plugin stays.
func TestInstallCNIKeepsCopies(t *testing.T) {
	root := t.TempDir()
	own := filepath.Join(root, HelperName)
	if err := os.WriteFile(own, []byte("copy"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := InstallCNI(root, root, "/elsewhere", []byte(`{"name":"skein-n1"}`)); err != nil {
		t.Fatal(err)
	}
	if err := RemoveCNI(root, root, "/elsewhere", "skein-n1"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(own); string(b) != "copy" {
		t.Errorf("the copy became %q", b)
	}
}

func TestForeignReadsContainerdsConfig(t *testing.T) {
	for text, want := range map[string]Foreign{
		`{"cni":{"binDir":"","binDirs":["/a","/b"],"confDir":"/c"}}`: {CNIDir: "/c", CNIBinDirs: []string{"/a", "/b"}},
		`{"cni":{"binDir":"/a","confDir":"/c"}}`:                     {CNIDir: "/c", CNIBinDirs: []string{"/a"}},
		`{"sandboxImage":"x"}`:                                       {},
		"":                                                           {},
		"[1]":                                                        {},
	} {
		var f Foreign
		f.readConfig(text)
		if !reflect.DeepEqual(f, want) {
			t.Errorf("%s: %+v, want %+v", text, f, want)
		}
	}
}

func TestCheckEndpoint(t *testing.T) {
	for _, good := range []string{"unix:///run/containerd/containerd.sock"} {
		if err := CheckEndpoint(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "/run/x.sock", "tcp://127.0.0.1:1", "unix://", "unix://run/x.sock", ":"} {
		if CheckEndpoint(bad) == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
