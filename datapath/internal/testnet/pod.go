package testnet

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
)

// CNIMode is the environment variable that makes a test executable a CNI plugin; see Main.
const CNIMode = "SKEIN_TESTNET_CNI"

// CNI runs this executable as a CNI plugin in the namespace node, as a runtime would, and returns its standard output.
func CNI(node *NS, command, containerID, netnsPath, conf string) ([]byte, error) {
	node.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), CNIMode+"=1", "CNI_COMMAND="+command, "CNI_CONTAINERID="+containerID,
		"CNI_NETNS="+netnsPath, "CNI_IFNAME=eth0", "CNI_PATH=/")
	cmd.Stdin = bytes.NewReader([]byte(conf))
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := node.Start(cmd, ""); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return out.Bytes(), fmt.Errorf("%w: %s%s", err, out.Bytes(), errOut.Bytes())
	}
	return out.Bytes(), nil
}

// Pod makes a namespace and plugs it into node by the CNI plugin.
func Pod(node *NS, name, dataDir string, podCIDR netip.Prefix) (*NS, netip.Addr) {
	node.t.Helper()
	pod := New(node.t, name)
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"test","type":"skein","podCIDR":%q,"dataDir":%q}`, podCIDR, dataDir)
	out, err := CNI(node, "ADD", name, pod.Path(), conf)
	if err != nil {
		node.t.Fatal(err)
	}
	var res struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &res); err != nil || len(res.IPs) != 1 {
		node.t.Fatalf("result of ADD: %v: %s", err, out)
	}
	return pod, res.IPs[0].Address.Addr()
}
