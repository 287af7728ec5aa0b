package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/cri/image"
)

// Where a runtime looks for networks and their plugins if it does not say (containerd's and CRI-O's defaults).
const (
	DefaultCNIDir    = "/etc/cni/net.d"
	DefaultCNIBinDir = "/opt/cni/bin"
)

// inspectTime is how long a runtime may take to describe itself.
const inspectTime = 5 * time.Second

// Foreign is what a runtime that Skein does not run itself says about itself.
type Foreign struct {
	// Name and Version, as "containerd" and "v2.1.4".
	Name, Version string
	// CNIDir is where it reads network configurations, CNIBinDirs where it looks for plugins; empty when it does not say.
	CNIDir     string
	CNIBinDirs []string
}

// CheckEndpoint tells whether a CRI endpoint is written as it must be.
func CheckEndpoint(endpoint string) error {
	_, err := socketOf(endpoint)
	return err
}

func socketOf(endpoint string) (string, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "unix" || u.Host != "" || u.Path == "" {
		return "", fmt.Errorf("container runtime endpoint %q must be like unix:///run/containerd/containerd.sock", endpoint)
	}
	return u.Path, nil
}

// Inspect asks the runtime at an endpoint who it is, and refuses one that cannot run this node's pods.
func Inspect(ctx context.Context, endpoint string) (Foreign, error) {
	path, err := socketOf(endpoint)
	if err != nil {
		return Foreign{}, err
	}
	fail := func(err error) (Foreign, error) {
		return Foreign{}, fmt.Errorf("container runtime at %s: %w", path, err)
	}
	if _, err := os.Stat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return Foreign{}, fmt.Errorf("no container runtime listens on %s: start it, or leave --cri-endpoint out to use skein's own: %w", path, err)
		}
		return fail(err)
	}
	cc, err := conn(path)
	if err != nil {
		return fail(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	cl := runtimeapi.NewRuntimeServiceClient(cc)
	v, err := cl.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return fail(fmt.Errorf("it does not answer with CRI v1: %w", err))
	}
	// Runtimes that do not know the call use the driver that Skein needs, or say so when the first pod starts.
	if rc, err := cl.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{}); err == nil && rc.GetLinux() != nil && rc.Linux.CgroupDriver == runtimeapi.CgroupDriver_SYSTEMD {
		return fail(errors.New("it makes cgroups through systemd, Skein makes those of pods itself: set SystemdCgroup = false (containerd) or cgroup_manager = \"cgroupfs\" (CRI-O)"))
	}
	st, err := cl.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return fail(err)
	}
	f := Foreign{Name: v.RuntimeName, Version: v.RuntimeVersion}
	f.readConfig(st.Info["config"])
	return f, nil
}

// readConfig takes what containerd shows of its configuration; other runtimes show none, or another.
func (f *Foreign) readConfig(text string) {
	var c struct {
		CNI struct {
			BinDir  string   `json:"binDir"`
			BinDirs []string `json:"binDirs"`
			ConfDir string   `json:"confDir"`
		} `json:"cni"`
	}
	if json.Unmarshal([]byte(text), &c) != nil {
		return
	}
	f.CNIDir, f.CNIBinDirs = c.CNI.ConfDir, c.CNI.BinDirs
	if len(f.CNIBinDirs) == 0 && c.CNI.BinDir != "" {
		f.CNIBinDirs = []string{c.CNI.BinDir}
	}
}

// ImportPause gives a containerd the pause image, under its own name; whether it uses it is a setting of that containerd.
func ImportPause(ctx context.Context, endpoint string) error {
	path, err := socketOf(endpoint)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if err := image.WritePause(&b, goruntime.GOARCH); err != nil {
		return err
	}
	cc, err := conn(path)
	if err != nil {
		return err
	}
	defer cc.Close()
	_, err = importImage(ctx, cc, &b, pinnedLabel)
	return err
}

// PauseImage is the name of the image that ImportPause imports.
const PauseImage = image.PauseName

// InstallCNI gives a foreign runtime our network: the configuration goes into dir, a link to the plugin into binDir. Files of others
// stay as they are: if one of them would be used instead of ours, that is an error that says so.
func InstallCNI(dir, binDir, helper string, conflist []byte) error {
	if err := ownNetwork(dir, conflist); err != nil {
		return err
	}
	if err := os.MkdirAll(binDir, 0o755); err != nil {
		return fmt.Errorf("network plugin: %w", err)
	}
	if err := linkPlugin(filepath.Join(binDir, HelperName), helper); err != nil {
		return fmt.Errorf("network plugin: %w", err)
	}
	return WriteCNI(dir, conflist)
}

// RemoveCNI takes away what InstallCNI made for this network; what is not ours stays.
func RemoveCNI(dir, binDir, helper, network string) error {
	var errs []error
	path := filepath.Join(dir, conflistName)
	if name, err := networkName(path); err == nil && name == network {
		errs = append(errs, os.Remove(path))
	}
	link := filepath.Join(binDir, HelperName)
	if to, err := os.Readlink(link); err == nil && to == helper {
		errs = append(errs, os.Remove(link))
	}
	return errors.Join(errs...)
}

// ownNetwork refuses a directory in which the runtime would find another network first: it takes the first file by name.
func ownNetwork(dir string, conflist []byte) error {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network configuration: %w", err)
	}
	for _, e := range entries {
		if e.Name() >= conflistName {
			break
		}
		if slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) && !e.IsDir() {
			return fmt.Errorf("the container runtime would use the network of %s, as it comes before %s: remove it, or give the runtime a directory of its own and name it with --cni-dir",
				filepath.Join(dir, e.Name()), conflistName)
		}
	}
	var ours struct{ Name string }
	if err := json.Unmarshal(conflist, &ours); err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	path := filepath.Join(dir, conflistName)
	switch name, err := networkName(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("network configuration: %w", err)
	case name != ours.Name:
		return fmt.Errorf("%s is of the network %q, this node's is %q: a runtime serves one node; remove the file if nobody uses it any more", path, name, ours.Name)
	}
	return nil
}

func networkName(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var c struct{ Name string }
	if err := json.Unmarshal(b, &c); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return c.Name, nil
}

// linkPlugin makes path lead to the helper. A file that an operator put there stays.
func linkPlugin(path, helper string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink == 0:
		return executable(path)
	default:
		if to, err := os.Readlink(path); err == nil && to == helper {
			return nil
		}
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(helper, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// FindRunc gives the path of runc, or an error that wraps ErrNoRunc and says how to get it.
func FindRunc() (string, error) { return findRunc() }

// String is how a runtime is shown to people.
func (f Foreign) String() string { return strings.TrimSpace(f.Name + " " + f.Version) }
