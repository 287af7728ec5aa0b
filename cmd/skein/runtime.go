package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/cri"
	"skein.io/skein/node/cri/containerd"
)

// containerdCmd is the embedded containerd; the daemon starts this binary with it.
type containerdCmd struct {
	Args []string `arg:"" optional:""`
}

func (c *containerdCmd) Run() error {
	return containerd.Main(c.Args)
}

type imagesCmd struct {
	Import imagesImportCmd `cmd:"" help:"Import images from a tar file (docker save, or an OCI layout); '-' reads standard input."`
	List   imagesListCmd   `cmd:"" help:"List the images that this node holds."`
}

type runtimeFlag struct {
	stateFlag
	CRIEndpoint string `name:"cri-endpoint" help:"Socket of the runtime (default: the node's own containerd)." env:"SKEIN_CRI_ENDPOINT"`
}

func (r runtimeFlag) endpoint() string {
	if r.CRIEndpoint != "" {
		return r.CRIEndpoint
	}
	return cri.EndpointIn(r.StateDir)
}

type imagesImportCmd struct {
	runtimeFlag
	Files []string `arg:"" help:"Tar files."`
}

func (i *imagesImportCmd) Run(ctx context.Context) error {
	// Asked first, because it says clearly when no runtime is there.
	rt, err := cri.Dial(ctx, cri.DialConfig{Endpoint: i.endpoint()})
	if err != nil {
		return fmt.Errorf("images import: %w", err)
	}
	rt.Close(ctx)
	for _, name := range i.Files {
		var in io.Reader = os.Stdin
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return fmt.Errorf("images import: %w", err)
			}
			defer f.Close()
			in = f
		}
		names, err := cri.ImportImage(ctx, i.endpoint(), in)
		if err != nil {
			return fmt.Errorf("images import %s: %w", name, err)
		}
		for _, n := range names {
			fmt.Println("imported", n)
		}
	}
	return nil
}

type imagesListCmd struct {
	runtimeFlag
}

func (i *imagesListCmd) Run(ctx context.Context) error {
	rt, err := cri.Dial(ctx, cri.DialConfig{Endpoint: i.endpoint()})
	if err != nil {
		return err
	}
	defer rt.Close(ctx)
	images, err := rt.Images.ListImages(ctx, &runtimeapi.ImageFilter{})
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tSIZE")
	for _, img := range images {
		for _, tag := range img.RepoTags {
			fmt.Fprintf(w, "%s\t%.1f MB\n", tag, float64(img.Size)/1e6)
		}
	}
	return w.Flush()
}
