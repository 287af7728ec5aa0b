// Command images keeps the container images of the conformance suite in an OCI layout, and serves them as a registry. It
// needs neither a container engine nor a network.
//
//	images add -layout DIR -name e2e-test-images/agnhost:2.63.0 [-rootfs DIR] [-file SRC:DST[:MODE]]... [-entrypoint A,B] [-cmd A,B] [-user U] [-env K=V]... [-port 80/tcp]...
//	images serve -layout DIR -addr HOST:PORT
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: images add|serve FLAGS")
	}
	var err error
	switch os.Args[1] {
	case "add":
		err = add(os.Args[2:])
	case "serve":
		err = serve(os.Args[2:])
	default:
		err = fmt.Errorf("unknown command %q: add or serve", os.Args[1])
	}
	if err != nil {
		log.Fatal("images: ", err)
	}
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// refName is where an OCI layout keeps an image's name (image-spec, annotations).
const refName = "org.opencontainers.image.ref.name"

func add(args []string) error {
	fl := flag.NewFlagSet("add", flag.ExitOnError)
	dir := fl.String("layout", "", "directory of the layout")
	name := fl.String("name", "", "repository:tag")
	rootfs := fl.String("rootfs", "", "directory that becomes the first layer")
	ep := fl.String("entrypoint", "", "words with commas between them")
	cmd := fl.String("cmd", "", "words with commas between them")
	user := fl.String("user", "", "user[:group]")
	var files, env, ports list
	fl.Var(&files, "file", "SRC:DST[:MODE], in a layer of its own")
	fl.Var(&env, "env", "K=V")
	fl.Var(&ports, "port", "80/tcp")
	_ = fl.Parse(args)
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, make := range []func() ([]byte, error){func() ([]byte, error) { return tarTree(*rootfs) }, func() ([]byte, error) { return tarFiles(files) }} {
		b, err := make()
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created = "linux", "amd64", v1.Time{Time: time.Unix(0, 0)}
	cf.Config = v1.Config{Entrypoint: words(*ep), Cmd: words(*cmd), User: *user,
		Env: append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, env...), ExposedPorts: map[string]struct{}{}}
	for _, p := range ports {
		cf.Config.ExposedPorts[p] = struct{}{}
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		return err
	}
	path, err := layout.FromPath(*dir)
	if errors.Is(err, fs.ErrNotExist) {
		path, err = layout.Write(*dir, empty.Index)
	}
	if err != nil {
		return err
	}
	return path.ReplaceImage(img, match.Name(*name), layout.WithAnnotations(map[string]string{refName: *name}))
}

func words(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// tarTree is a directory as an archive; nil for no directory.
func tarTree(dir string) ([]byte, error) {
	if dir == "" {
		return nil, nil
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, p)
		if err != nil || rel == "." {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		link := ""
		if fi.Mode()&fs.ModeSymlink != 0 {
			if link, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, link)
		if err != nil {
			return err
		}
		h.Name, h.ModTime, h.AccessTime, h.ChangeTime, h.Uname, h.Gname = rel, time.Unix(0, 0), time.Time{}, time.Time{}, "", ""
		if fi.IsDir() {
			h.Name += "/"
		}
		if err := tw.WriteHeader(h); err != nil || !fi.Mode().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		_, err = tw.Write(b)
		return err
	})
	return buf.Bytes(), errors.Join(err, tw.Close())
}

// tarFiles is an archive of single files; nil for none.
func tarFiles(files []string) ([]byte, error) {
	if len(files) == 0 {
		return nil, nil
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		p := strings.Split(f, ":")
		mode := int64(0o755)
		if len(p) < 2 {
			return nil, fmt.Errorf("file %q: want SRC:DST[:MODE]", f)
		}
		if len(p) > 2 {
			var err error
			if mode, err = strconv.ParseInt(p[2], 8, 32); err != nil {
				return nil, fmt.Errorf("file %q: %w", f, err)
			}
		}
		b, err := os.ReadFile(p[0])
		if err != nil {
			return nil, err
		}
		h := &tar.Header{Name: strings.TrimPrefix(p[1], "/"), Mode: mode, Size: int64(len(b)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(b); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), tw.Close()
}

// serve answers pulls over plain http. A layout's blobs lie as the registry wants them; its manifests are put in at the start.
func serve(args []string) error {
	fl := flag.NewFlagSet("serve", flag.ExitOnError)
	dir := fl.String("layout", "", "directory of the layout")
	addr := fl.String("addr", "127.0.0.1:5000", "address to listen at")
	_ = fl.Parse(args)
	h := registry.New(registry.WithBlobHandler(registry.NewDiskBlobHandler(filepath.Join(*dir, "blobs"))), registry.Logger(log.New(io.Discard, "", 0)))
	path, err := layout.FromPath(*dir)
	if err != nil {
		return err
	}
	index, err := path.ImageIndex()
	if err != nil {
		return err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range m.Manifests {
		b, err := path.Bytes(d.Digest)
		if err != nil {
			return err
		}
		repo, tag, _ := strings.Cut(d.Annotations[refName], ":")
		r := httptest.NewRequest(http.MethodPut, "/v2/"+repo+"/manifests/"+tag, bytes.NewReader(b))
		r.Header.Set("Content-Type", string(d.MediaType))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code/100 != 2 {
			return fmt.Errorf("image %s: %d %s", d.Annotations[refName], w.Code, w.Body)
		}
	}
	l, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	fmt.Printf("%d images at %s\n", len(m.Manifests), l.Addr())
	return http.Serve(l, h)
}
