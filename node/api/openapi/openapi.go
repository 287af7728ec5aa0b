// Package openapi serves OpenAPI documents that were rendered at build time, from compressed files
// in the binary: 1.2 MB there instead of some 70 MB of code and memory. Custom resources are
// merged in when there are any.
//
// The files below static/ are generated (see gen) and are upstream's byte for byte. Everything here
// is safe for concurrent use.
package openapi

//go:generate go run -tags openapigen,grpcnotrace -ldflags "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" ./gen static
//go:generate go run -tags openapigen,grpcnotrace -ldflags "-X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" ./gen -all static

import (
	"embed"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

//go:embed all:static
var files embed.FS

// Documents are the embedded files. They are read out of the binary when somebody wants them.
type Documents struct {
	v3             map[string]*document // by group version path: "apis/apps/v1"
	v2JSON, v2Wire *document
	since          time.Time // when they were read
	// v2All is the document of all versions that upstream knows, or nil when none but those that it serves by default is wanted.
	v2All  *document
	hidden []string // path prefixes in v2All
}

// Load reads the embedded files: those of the versions that upstream serves by default, and of more. What more has no kinds is not missed.
func Load(more []schema.GroupVersion) (*Documents, error) {
	d := &Documents{v3: map[string]*document{}, since: time.Now()}
	var err error
	if d.v2JSON, err = load("static/v2.json.gz"); err != nil {
		return nil, err
	}
	if d.v2Wire, err = load("static/v2.pb.gz"); err != nil {
		return nil, err
	}
	entries, err := files.ReadDir("static/v3")
	if err != nil {
		return nil, fmt.Errorf("embedded OpenAPI documents: %w", err)
	}
	for _, e := range entries {
		path := strings.ReplaceAll(strings.TrimSuffix(e.Name(), ".json.gz"), "__", "/")
		if d.v3[path], err = load("static/v3/" + e.Name()); err != nil {
			return nil, err
		}
	}
	if len(more) > 0 {
		if err := d.addExtra(more); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// addExtra adds the documents of versions that upstream does not serve by default.
func (d *Documents) addExtra(more []schema.GroupVersion) error {
	entries, err := files.ReadDir("static/extra/v3")
	if err != nil {
		return fmt.Errorf("embedded OpenAPI documents: %w", err)
	}
	for _, e := range entries {
		path := strings.ReplaceAll(strings.TrimSuffix(e.Name(), ".json.gz"), "__", "/")
		group, version, _ := strings.Cut(strings.TrimPrefix(path, "apis/"), "/")
		if !slices.ContainsFunc(more, func(gv schema.GroupVersion) bool {
			return gv.Group == group && (gv.Version == version || version == "")
		}) {
			d.hidden = append(d.hidden, "/"+path+"/")
			continue
		}
		if d.v3[path], err = load("static/extra/v3/" + e.Name()); err != nil {
			return err
		}
	}
	d.v2All, err = load("static/extra/v2.json.gz")
	return err
}

// base gives the version 2 document of what is built in and served.
func (d *Documents) base() (*spec.Swagger, error) {
	doc := d.v2JSON
	if d.v2All != nil {
		doc = d.v2All
	}
	b, err := doc.unpack()
	if err != nil {
		return nil, err
	}
	base := &spec.Swagger{}
	if err := base.UnmarshalJSON(b); err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document: %w", err)
	}
	if base.Paths != nil {
		maps.DeleteFunc(base.Paths.Paths, func(path string, _ spec.PathItem) bool {
			return slices.ContainsFunc(d.hidden, func(prefix string) bool { return strings.HasPrefix(path, prefix) })
		})
	}
	return base, nil
}

func load(name string) (*document, error) {
	if _, err := fs.Stat(files, name); err != nil {
		return nil, fmt.Errorf("embedded OpenAPI documents: %w", err)
	}
	return &document{name: name}, nil
}

// V3 gives the JSON document of one group version ("api/v1", "apis/apps/v1"), or false when
// that is not built in.
func (d *Documents) V3(path string) ([]byte, bool, error) {
	doc, ok := d.v3[path]
	if !ok {
		return nil, false, nil
	}
	b, err := doc.unpack()
	return b, true, err
}
