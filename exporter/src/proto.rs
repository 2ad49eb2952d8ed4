//! The messages of an ONNX file, as far as they are written here.
//!
//! Names and field numbers are those of `onnx.proto` in the onnx repository. Scalars are `optional`
//! because that schema is proto2: a checker asks whether `i = 0` is there at all.

use prost::Message;

/// Element types of `TensorProto.DataType`.
pub mod element {
    /// 32-bit float.
    pub const FLOAT: i32 = 1;
    /// 8-bit unsigned integer.
    pub const UINT8: i32 = 2;
    /// 8-bit integer.
    pub const INT8: i32 = 3;
    /// 32-bit integer.
    pub const INT32: i32 = 6;
    /// 64-bit integer.
    pub const INT64: i32 = 7;
    /// 16-bit float.
    pub const FLOAT16: i32 = 10;
    /// 64-bit float.
    pub const DOUBLE: i32 = 11;
    /// The upper half of a 32-bit float.
    pub const BFLOAT16: i32 = 16;
    /// 8-bit float of four exponent and three mantissa bits.
    pub const FLOAT8E4M3FN: i32 = 17;
    /// 4-bit integer, two to a byte, the first in the lower half.
    pub const INT4: i32 = 22;
}

/// `TensorProto.DataLocation.EXTERNAL`: the bytes are in a file beside the model.
pub const EXTERNAL: i32 = 1;

/// A whole file.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the file format.
    #[prost(int64, optional, tag = "1")]
    pub ir_version: Option<i64>,
    /// Program that wrote the file.
    #[prost(string, optional, tag = "2")]
    pub producer_name: Option<String>,
    /// Its version.
    #[prost(string, optional, tag = "3")]
    pub producer_version: Option<String>,
    /// The network.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets in use.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Free key-value pairs.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
    /// Operators defined by others.
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
}

/// An operator defined by others.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    /// Name of the operator.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Its inputs.
    #[prost(string, repeated, tag = "4")]
    pub input: Vec<String>,
    /// Its outputs.
    #[prost(string, repeated, tag = "5")]
    pub output: Vec<String>,
    /// Its static arguments.
    #[prost(string, repeated, tag = "6")]
    pub attribute: Vec<String>,
    /// What it does.
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<NodeProto>,
    /// Operator sets in use.
    #[prost(message, repeated, tag = "9")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Its domain.
    #[prost(string, optional, tag = "10")]
    pub domain: Option<String>,
}

/// An operator set.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    /// Empty for the standard operators.
    #[prost(string, optional, tag = "1")]
    pub domain: Option<String>,
    /// Its version.
    #[prost(int64, optional, tag = "2")]
    pub version: Option<i64>,
}

/// Nodes in topological order and what they read.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// Operators.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the graph.
    #[prost(string, optional, tag = "2")]
    pub name: Option<String>,
    /// Constants and weights.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// What a run must give.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// What a run returns.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

/// One operator.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of values; empty where an optional input is left out.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of values.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, optional, tag = "3")]
    pub name: Option<String>,
    /// Name of the operator.
    #[prost(string, optional, tag = "4")]
    pub op_type: Option<String>,
    /// Static arguments.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Domain of the operator; empty for the standard's.
    #[prost(string, optional, tag = "7")]
    pub domain: Option<String>,
}

/// A static argument: exactly one of the values, told by `type`.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name of the argument.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Value of a float.
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    /// Value of an integer.
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    /// Value of a string.
    #[prost(bytes = "vec", optional, tag = "4")]
    pub s: Option<Vec<u8>>,
    /// Value of a list of integers.
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    /// `AttributeType`: 1 float, 2 integer, 3 string, 7 integers.
    #[prost(int32, optional, tag = "20")]
    pub r#type: Option<i32>,
    /// In a function, the argument of the function that gives the value.
    #[prost(string, optional, tag = "21")]
    pub ref_attr_name: Option<String>,
}

/// A constant or weight.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Shape.
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    /// Element type, see [`element`].
    #[prost(int32, optional, tag = "2")]
    pub data_type: Option<i32>,
    /// Name of the value.
    #[prost(string, optional, tag = "8")]
    pub name: Option<String>,
    /// Elements, little-endian, row-major.
    #[prost(bytes = "vec", optional, tag = "9")]
    pub raw_data: Option<Vec<u8>>,
    /// `location`, `offset` and `length` of elements in another file.
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    /// [`EXTERNAL`] when the elements are in another file.
    #[prost(int32, optional, tag = "14")]
    pub data_location: Option<i32>,
}

/// A pair of strings.
#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    /// Key.
    #[prost(string, optional, tag = "1")]
    pub key: Option<String>,
    /// Value.
    #[prost(string, optional, tag = "2")]
    pub value: Option<String>,
}

/// An input or output.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name of the value.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Its type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

/// The type of a value.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// The only kind of value in use.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

/// Element type and shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorTypeProto {
    /// Element type, see [`element`].
    #[prost(int32, optional, tag = "1")]
    pub elem_type: Option<i32>,
    /// Shape.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

/// A shape.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// Outermost first.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// One dimension of a shape.
#[derive(Clone, PartialEq, Message)]
pub struct DimensionProto {
    /// A number, or a name where the size is open.
    #[prost(oneof = "Dimension", tags = "1, 2")]
    pub value: Option<Dimension>,
}

/// The size of one dimension.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Dimension {
    /// A fixed size.
    #[prost(int64, tag = "1")]
    DimValue(i64),
    /// An open size; equal names mean equal sizes.
    #[prost(string, tag = "2")]
    DimParam(String),
}

impl AttributeProto {
    /// A float argument.
    pub fn float(name: &str, value: f64) -> Self {
        Self { f: Some(value as f32), ..Self::new(name, 1) }
    }

    /// An integer argument.
    pub fn int(name: &str, value: i64) -> Self {
        Self { i: Some(value), ..Self::new(name, 2) }
    }

    /// A string argument.
    pub fn text(name: &str, value: &str) -> Self {
        Self { s: Some(value.into()), ..Self::new(name, 3) }
    }

    /// A list of integers.
    pub fn ints(name: &str, values: impl IntoIterator<Item = usize>) -> Self {
        let ints = values.into_iter().map(|value| value as i64).collect();
        Self { ints, ..Self::new(name, 7) }
    }

    /// The float argument `of` of the function around.
    pub fn float_of(name: &str, of: &str) -> Self {
        Self { ref_attr_name: Some(of.into()), ..Self::new(name, 1) }
    }

    /// The integer argument `of` of the function around.
    pub fn int_of(name: &str, of: &str) -> Self {
        Self { ref_attr_name: Some(of.into()), ..Self::new(name, 2) }
    }

    fn new(name: &str, kind: i32) -> Self {
        Self { name: Some(name.into()), r#type: Some(kind), ..Self::default() }
    }
}

impl OperatorSetIdProto {
    /// Version `version` of the operators of `domain`.
    pub fn new(domain: &str, version: i64) -> Self {
        Self { domain: Some(domain.into()), version: Some(version) }
    }
}

impl StringStringEntryProto {
    /// The pair (`key`, `value`).
    pub fn new(key: &str, value: String) -> Self {
        Self { key: Some(key.into()), value: Some(value) }
    }
}
