package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/cri/image"
)

// criNamespace is where containerd's CRI keeps images and containers.
const criNamespace = "k8s.io"

// snapshotter is containerd's default, and the only one that renderConfig leaves on.
const snapshotter = "overlayfs"

// Labels that containerd's CRI gives to images of its own (internal/cri/labels).
var (
	managedLabel = map[string]string{"io.cri-containerd.image": "managed"}
	pinnedLabel  = map[string]string{"io.cri-containerd.image": "managed", "io.cri-containerd.pinned": "pinned"}
)

// conn opens a connection to a containerd's socket. A new one for each use: one that was refused waits a second.
func conn(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// probe tells whether the runtime answers and says that it is ready; its network need not be.
func probe(ctx context.Context, address string) error {
	cc, err := conn(address)
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	res, err := runtimeapi.NewRuntimeServiceClient(cc).Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return err
	}
	for _, cond := range res.GetStatus().GetConditions() {
		if cond.Type == runtimeapi.RuntimeReady && !cond.Status {
			return fmt.Errorf("runtime is not ready: %s: %s", cond.Reason, cond.Message)
		}
	}
	return nil
}

// importPause makes sure that the pause image is there, unpacked and pinned. Somebody may have removed it, and
// containerd would then try to pull it.
func (c *Containerd) importPause(ctx context.Context) error {
	cc, err := conn(c.p.address)
	if err != nil {
		return err
	}
	defer cc.Close()
	res, err := runtimeapi.NewImageServiceClient(cc).ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image.PauseName}})
	if err == nil && res.Image != nil && res.Image.Pinned {
		return nil
	}
	var b bytes.Buffer
	if err := image.WritePause(&b, runtime.GOARCH); err != nil {
		return err
	}
	_, err = importImage(ctx, cc, &b, pinnedLabel)
	return err
}

// ImportImage loads an archive ("docker save" or OCI layout, may be compressed) into the runtime, ready to start, and returns the
// names that its images have there. Images without a complete name in the archive cannot be used and are an error.
func (c *Containerd) ImportImage(ctx context.Context, r io.Reader) ([]string, error) {
	return ImportImage(ctx, c.Endpoint(), r)
}

// ImportImage is the same for the runtime at a CRI endpoint; it must be a containerd.
func ImportImage(ctx context.Context, endpoint string, r io.Reader) ([]string, error) {
	address, ok := strings.CutPrefix(endpoint, "unix://")
	if !ok {
		return nil, fmt.Errorf("import image: endpoint %q is not a unix:// address", endpoint)
	}
	cc, err := conn(address)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	defer cc.Close()
	return importImage(ctx, cc, r, managedLabel)
}

func importImage(ctx context.Context, cc *grpc.ClientConn, r io.Reader, labels map[string]string) ([]string, error) {
	cl, err := client.NewWithConn(cc)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	plain, err := compression.DecompressStream(r)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	defer plain.Close()
	ctx = namespaces.WithNamespace(ctx, criNamespace)
	imgs, err := cl.Import(ctx, plain, client.WithImageLabels(labels))
	if err != nil {
		return nil, fmt.Errorf("import image: not an image archive for linux/%s, or the runtime failed: %w", runtime.GOARCH, err)
	}
	if len(imgs) == 0 {
		return nil, errors.New("import image: no image in the archive has a name: save it with a complete one, like registry.example/app:1")
	}
	var names []string
	for _, img := range imgs {
		// The first pod would wait for it otherwise.
		whole := client.NewImage(cl, img)
		if err := whole.Unpack(ctx, snapshotter); err != nil {
			return nil, fmt.Errorf("unpack image %s: %w", img.Name, err)
		}
		if err := nameByID(ctx, cl, whole); err != nil {
			return nil, fmt.Errorf("name image %s by its ID: %w", img.Name, err)
		}
		names = append(names, img.Name)
	}
	return names, nil
}

// nameByID gives an image its ID as a second name, as a pull does: containerd's CRI finds by that what is mounted as a volume. It
// would do so itself, were the image not labelled as its own already.
func nameByID(ctx context.Context, cl *client.Client, img client.Image) error {
	config, err := img.Config(ctx)
	if err != nil {
		return err
	}
	_, err = cl.ImageService().Create(ctx, images.Image{Name: config.Digest.String(), Target: img.Target(), Labels: img.Labels()})
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}
