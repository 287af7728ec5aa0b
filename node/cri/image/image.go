// Package image writes small container images as OCI archives, without a registry and without a builder: the pause image that every
// pod needs, and the images of the project's own tests and demo. It is pure: the same input gives the same bytes.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// File is one entry of an image's only layer.
type File struct {
	// Path is absolute.
	Path string
	// Mode holds the permission bits; directories that are not listed get 0755.
	Mode int64
	// Content of a regular file. With Link set it is not used.
	Content []byte
	// Link makes the entry a symbolic link to this target.
	Link string
	// Dir makes the entry a directory.
	Dir bool
}

// Spec describes an image for one platform, linux/<Arch>.
type Spec struct {
	// Name is complete: registry, repository and tag ("skein.local/pause:1"). CRI cannot see an image with a shorter one.
	Name string
	// Arch is a GOARCH.
	Arch       string
	Files      []File
	Entrypoint []string
	Cmd        []string
	Env        []string
	// User as in a Dockerfile, "65534:65534"; empty = root.
	User       string
	WorkingDir string
	Labels     map[string]string
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type imageConfig struct {
	platform
	Config struct {
		User       string            `json:"User,omitempty"`
		Env        []string          `json:"Env,omitempty"`
		Entrypoint []string          `json:"Entrypoint,omitempty"`
		Cmd        []string          `json:"Cmd,omitempty"`
		WorkingDir string            `json:"WorkingDir,omitempty"`
		Labels     map[string]string `json:"Labels,omitempty"`
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	Manifests     []descriptor `json:"manifests"`
}

// Write writes the image as a tar of an OCI image layout (image-spec 1.1), with the name where containerd looks for it.
func Write(w io.Writer, s Spec) error {
	if err := s.check(); err != nil {
		return err
	}
	layer, err := s.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", s.Name, err)
	}
	a := &archive{tw: tar.NewWriter(w)}
	a.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	plat := platform{Architecture: s.Arch, OS: "linux"}

	m := manifest{SchemaVersion: 2, MediaType: "application/vnd.oci.image.manifest.v1+json"}
	m.Layers = []descriptor{a.blob("application/vnd.oci.image.layer.v1.tar", layer)}
	cfg := imageConfig{platform: plat}
	cfg.Config.User, cfg.Config.Env, cfg.Config.Entrypoint, cfg.Config.Cmd = s.User, s.Env, s.Entrypoint, s.Cmd
	cfg.Config.WorkingDir, cfg.Config.Labels = s.WorkingDir, s.Labels
	cfg.RootFS.Type, cfg.RootFS.DiffIDs = "layers", []string{m.Layers[0].Digest}
	m.Config = a.json("application/vnd.oci.image.config.v1+json", cfg)

	d := a.json(m.MediaType, m)
	d.Platform = &plat
	d.Annotations = map[string]string{
		"io.containerd.image.name":          s.Name,
		"org.opencontainers.image.ref.name": s.Name[strings.LastIndexByte(s.Name, ':')+1:],
	}
	b, err := json.Marshal(index{SchemaVersion: 2, Manifests: []descriptor{d}})
	if err != nil {
		return fmt.Errorf("image %s: %w", s.Name, err)
	}
	a.file("index.json", b)
	if a.err == nil {
		a.err = a.tw.Close()
	}
	if a.err != nil {
		return fmt.Errorf("image %s: %w", s.Name, a.err)
	}
	return nil
}

func (s Spec) check() error {
	var errs []error
	host, rest, ok := strings.Cut(s.Name, "/")
	if !ok || !strings.ContainsAny(host, ".:") || !strings.Contains(rest, ":") {
		errs = append(errs, fmt.Errorf("image name %q must be complete: registry/repository:tag", s.Name))
	}
	if s.Arch == "" {
		errs = append(errs, errors.New("image without an architecture"))
	}
	seen := map[string]bool{}
	for _, f := range s.Files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" {
			errs = append(errs, fmt.Errorf("image %s: file %q: path must be absolute and clean", s.Name, f.Path))
		}
		if seen[f.Path] {
			errs = append(errs, fmt.Errorf("image %s: file %q is there twice", s.Name, f.Path))
		}
		seen[f.Path] = true
	}
	return errors.Join(errs...)
}

// layer gives the tar of the files, with their parent directories before them.
func (s Spec) layer() ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	made := map[string]bool{"/": true}
	var mkdir func(p string, mode int64) error
	mkdir = func(p string, mode int64) error {
		if made[p] {
			return nil
		}
		if err := mkdir(path.Dir(p), 0o755); err != nil {
			return err
		}
		made[p] = true
		return tw.WriteHeader(&tar.Header{Name: p[1:] + "/", Typeflag: tar.TypeDir, Mode: mode})
	}
	for _, f := range s.Files {
		if f.Dir {
			if err := mkdir(f.Path, f.Mode); err != nil {
				return nil, err
			}
			continue
		}
		if err := mkdir(path.Dir(f.Path), 0o755); err != nil {
			return nil, err
		}
		h := &tar.Header{Name: f.Path[1:], Typeflag: tar.TypeReg, Mode: f.Mode, Size: int64(len(f.Content))}
		if f.Link != "" {
			h.Typeflag, h.Linkname, h.Size, h.Mode = tar.TypeSymlink, f.Link, 0, 0o777
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if f.Link == "" {
			if _, err := tw.Write(f.Content); err != nil {
				return nil, err
			}
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// archive keeps the first error of a sequence of writes.
type archive struct {
	tw  *tar.Writer
	err error
}

func (a *archive) file(name string, b []byte) {
	if a.err != nil {
		return
	}
	if a.err = a.tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(b))}); a.err == nil {
		_, a.err = a.tw.Write(b)
	}
}

func (a *archive) blob(mediaType string, b []byte) descriptor {
	sum := sha256.Sum256(b)
	digest := hex.EncodeToString(sum[:])
	a.file("blobs/sha256/"+digest, b)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: int64(len(b))}
}

func (a *archive) json(mediaType string, v any) descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		if a.err == nil {
			a.err = err
		}
		return descriptor{}
	}
	return a.blob(mediaType, b)
}
